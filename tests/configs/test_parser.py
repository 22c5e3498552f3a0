from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.runtime.provenance import save_config


@dataclass(kw_only=True)
class Example:
    output_dir: str = field(metadata={"help": "Required."})
    learning_rate: float = field(default=1e-3, metadata={"help": "A float."})
    steps: int | None = field(default=None, metadata={"help": "An optional int."})
    loss: Literal["bce", "bt"] = field(default="bce", metadata={"help": "A choice."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "A list."})
    enabled: bool = field(default=False, metadata={"help": "A switch."})
    active: bool = field(default=True, metadata={"help": "A switch that is on."})

    def __post_init__(self) -> None:
        check(self.learning_rate > 0, "learning_rate", self.learning_rate, "greater than 0")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_then_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml",
        "output_dir: out\nlearning_rate: 5e-6\nsteps: null\nloss: bt\nnames: [x, y]\nenabled: true\nactive: false\n",
    )
    config = parse_config(Example, ["--config", str(path)])
    assert config == Example(
        output_dir="out", learning_rate=5e-6, steps=None, loss="bt", names=["x", "y"], enabled=True, active=False
    )
    config = parse_config(Example, ["--config", str(path), "--names", "z", "--steps", "7", "--enabled", "false"])
    assert (config.names, config.steps, config.enabled, config.loss) == (["z"], 7, False, "bt")


def test_the_command_line_replaces_what_its_option_stands_in_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("pretrained_model_name_or_path: p\ntrain_dataset: d\noutput_dir: o\nreward_model: a\n")
    config = parse_config(PRFLTrainingConfig, ["--config", str(path), "--reward_models", "b", "c"])
    assert (config.reward_model, config.reward_models) == (None, ["b", "c"])
    path.write_text(path.read_text().replace("reward_model: a", "reward_models: [a, b]"))
    config = parse_config(PRFLTrainingConfig, ["--config", str(path), "--reward_model", "c"])
    assert (config.reward_model, config.reward_models) == ("c", None)
    with pytest.raises(ValueError, match="not both"):
        parse_config(PRFLTrainingConfig, ["--config", str(path), "--reward_model", "c", "--reward_models", "b"])


def test_text_in_a_file_stays_as_it_is_written(tmp_path: Path) -> None:
    """YAML 1.1 would read an octal number, a flag, a number of base 60 and a date."""
    for text in ("0123", "on", "12:30", "2024-01-01", "1_000", "1e3", "0x10", ".5"):
        path = write(tmp_path / "a.yaml", f"output_dir: {text}\nnames: [{text}, b]\n")
        config = parse_config(Example, ["--config", str(path)])
        assert (config.output_dir, config.names) == (text, [text, "b"])
        assert parse_config(Example, ["--output_dir", text]).output_dir == text
    path = write(
        tmp_path / "a.yaml", "output_dir: ''\nlearning_rate: .inf\nsteps: 010\nnames: []\nenabled: on\nactive: No\n"
    )
    assert parse_config(Example, ["--config", str(path)]) == Example(
        output_dir="", learning_rate=float("inf"), steps=10, names=[], enabled=True, active=False
    )


def test_parts_that_files_share(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "names: &names [x]\noutput_dir: &o out\nloss: bt\n")
    assert parse_config(Example, ["--config", str(path)]).names == ["x"]
    path.write_bytes(b"\xef\xbb\xbfoutput_dir: \xc3\xa4\r\n")
    assert parse_config(Example, ["--config", str(path)]).output_dir == "\u00e4"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--enabled"], (True, True)),
        (["--enabled", "true"], (True, True)),
        (["--enabled=False"], (False, True)),
        (["--enabled", "--enabled", "no"], (False, True)),
        (["--no_active"], (False, False)),
        (["--no-active", "--active"], (False, True)),
        (["--active", "0"], (False, False)),
    ],
)
def test_flags(words: list[str], expected: tuple[bool, bool]) -> None:
    config = parse_config(Example, ["--output_dir=o", *words])
    assert (config.enabled, config.active) == expected


def test_values_that_look_like_options() -> None:
    config = parse_config(Example, ["--output-dir=--a-b=c-d", "--names", "x-y", "-1", "--steps", "-1"])
    assert (config.output_dir, config.names, config.steps) == ("--a-b=c-d", ["x-y", "-1"], -1)


def test_what_is_saved_reads_back_equal(tmp_path: Path) -> None:
    for names in (["p", "q r"], [], ["", "null", "-1", "--x"], ["1", "true", "0123", "12:30"]):
        config = Example(output_dir="out", learning_rate=1e-7, names=names, active=False)
        save_config(config, tmp_path / "saved.yaml")
        assert parse_config(Example, ["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: o\nlearning_rat: 1", "'learning_rat' is not a field of Example. Did you mean 'learning_rate'"),
        ("output_dir: o\nlearning_rate: fast", "bad.yaml: `learning_rate` must be a number, got 'fast'"),
        ("output_dir: o\nloss: btt", "bad.yaml: `loss` must be one of bce, bt, got 'btt'"),
        ("output_dir: o\nlearning_rate: -1", "`learning_rate` must be greater than 0, got -1.0"),
        ("output_dir: o\nnames: {a: 1}", "'names' is a mapping"),
        ("output_dir: o\nnames: [[a]]", "'names' must be a list of single values"),
        ("output_dir: o\nnames: [null]", "'names' must be a list of single values"),
        ("output_dir: o\nsteps: [1]", "`steps` must be a single value, got the list \\['1'\\]"),
        ("output_dir: o\nsteps: 1.0", "`steps` must be an integer, got '1.0'"),
        ("output_dir: o\nenabled: maybe", "`enabled` must be true or false, got 'maybe'"),
        (
            "output_dir: o\nsteps: 1\nsteps: 2",
            "bad.yaml, line 3, column 1: not valid YAML: the key 'steps' appears twice",
        ),
        ("output_dir: o\nsteps: !!python/name:os.system", "bad.yaml, line 2, column 8: not valid YAML"),
        ("output_dir: o\n1: 2", "'1' is not a field"),
        ("learning_rate: 1", "`output_dir` must be given"),
        ("- a", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(Example, ["--config", str(write(tmp_path / "bad.yaml", text))])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'learning_rat' is not a field of Example. Did you mean 'learning_rate'"):
        parse_config(Example, ["--learning_rat", "1"])  # and not that --output_dir is missing
    assert parse_config(Example, ["--output-dir=o", "--no_active"]).active is False
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_config(Example, ["--config", "nowhere.yaml"])


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(Example, ["--help"], description="What it does.")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for text in ("What it does.", "--config", "--learning_rate", "A choice.", "{bce,bt}"):
        assert text in shown
