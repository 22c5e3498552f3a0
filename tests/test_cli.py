import subprocess
import sys

import pytest

import hy_prfl
from hy_prfl.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_unknown_command() -> None:
    with pytest.raises(SystemExit, match="there is no command 'trian'"):
        main(["trian"])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--output" in shown or command == "push"


def test_console_command_is_installed_and_quick_to_answer() -> None:
    code = "import sys, hy_prfl.cli; hy_prfl.cli.main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_public_names() -> None:
    for name in hy_prfl.__all__:
        assert getattr(hy_prfl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = hy_prfl.Nothing
