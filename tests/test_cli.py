import subprocess
import sys

import pytest

import hy_prfl
from hy_prfl.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert capsys.readouterr().err.startswith("error: there is no command 'trian'; it is one of preprocess, ")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--output" in shown or command == "push"


def test_help_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/hy-prfl", "plan", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith("usage: hy-prfl plan --config FILE.yaml ")


def test_torchvision_is_not_asked_for() -> None:
    """diffusers' import of image processors prints nothing. Other warnings of the same logger are still printed."""
    code = (
        "import hy_prfl, logging; from diffusers import WanImageToVideoPipeline; "
        "logging.getLogger('transformers.utils.import_utils').warning('`XImageProcessor` requires torchvision')"
    )
    finished = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True)
    assert finished.stdout == ""
    assert finished.stderr.splitlines() == ["[transformers] `XImageProcessor` requires torchvision"]


def test_public_names() -> None:
    for name in hy_prfl.__all__:
        assert getattr(hy_prfl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = hy_prfl.Nothing
