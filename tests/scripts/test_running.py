"""How commands start and end: no waiting for torch before the options are checked, one line for a mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hy_prfl.cli import COMMANDS
from hy_prfl.configs.base import check
from hy_prfl.scripts.running import EXIT_CODE, is_mistake, run


ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "diffusers", "transformers", "datasets", "deepspeed", "accelerate", "peft")
# Runs a module as `python -m` does, and writes down at the end which of the libraries it has imported.
PROGRAM = f"""
import atexit, pathlib, runpy, sys
module, path = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: path.write_text(" ".join(name for name in {LIBRARIES!r} if name in sys.modules)))
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
# Options that each command accepts.
ACCEPTED = {
    "preprocess": ["--pretrained_model_name_or_path=wan", "--manifest=clips.json", "--output_dir=out"],
    "label": ["--dataset=data", "--annotations=labels.csv", "--output_dir=out"],
    "train_reward": ["--pretrained_model_name_or_path=wan", "--train_dataset=data", "--output_dir=out"],
    "train_prfl": [
        *("--pretrained_model_name_or_path=wan", "--train_dataset=data", "--output_dir=out"),
        "--reward_model=reward",
    ],
    "plan": ["--config=recipe.yaml"],
    "score": ["--reward_model=reward", "--dataset=data", "--output=scores.csv"],
    "generate": ["--pretrained_model_name_or_path=wan", "--prompts=prompts.json", "--output_dir=out"],
    "convert": ["--transformer=wan", "--output_dir=out"],
    "convert_recipe": ["--config=recipe.yaml", "--output=new.yaml"],
    "annotate": ["--manifest=clips.json", "--output=labels.json"],
    "compare": ["--left=data", "--right=wan"],
    "report": ["--run=data"],
    "push": ["--folder=data"],
    "pull": ["--repo_id=user/reward", "--output_dir=out"],
}
# More options, and what the one line says about them.
MISTAKES: dict[str, list[tuple[list[str], str]]] = {
    "preprocess": [
        (["--num_frames=many"], "command line: `num_frames` must be an integer, got 'many'."),
        (["--num_frames=8"], "`num_frames` must be of the form 4k + 1, got 8."),
        (["--upstream_meta=meta"], "`manifest` must be given, or else `upstream_meta`, and not both, got 'clips.json'."),
        (["--manifest=none.json"], "`manifest`: there is no file 'none.json'."),
        (["--pretrained_model_name_or_path=./none"], "`pretrained_model_name_or_path`: there is no folder './none', and it does not have the form of a Hub id"),
    ],
    "label": [
        (["--overwrite=perhaps"], "command line: `overwrite` must be true or false, got 'perhaps'."),
        (["--unknown_ids=drop"], "command line: `unknown_ids` must be one of error, ignore, got 'drop'."),
        (["--output_dir="], "`output_dir` must be a text that is not empty, or left out, got ''."),
        (["--annotations=none.csv"], "`annotations`: there is no file 'none.csv'."),
        (["--dataset=/none"], "`dataset`: there is no folder '/none'"),
    ],
    "train_reward": [
        (["--num_layers=1.5"], "command line: `num_layers` must be an integer, got '1.5'."),
        (["--offload_activations"], "`offload_activations` must be left out without `gradient_checkpointing`, got True."),
        (["--train_dataset=/none"], "`train_dataset`: there is no folder '/none'"),
        (["--validation_dataset=/none"], "`validation_dataset`: there is no folder '/none'"),
        (["--resume_from_checkpoint=none"], "`resume_from_checkpoint`: there is no file or folder 'none'."),
    ],
    "train_prfl": [
        (["--learning_rate=fast"], "command line: `learning_rate` must be a number, got 'fast'."),
        (["--reward_loss=hinge"], "command line: `reward_loss` must be one of logit, sigmoid, logsigmoid, got 'hinge'."),
        (["--step_range", "1", "x"], "command line: `step_range` must be integers, got 'x'."),
        (["--compile", "--shard_reward_model"], "`compile` must be false with `shard_reward_model`, got True."),
        (["--reward_model=a/b/c"], "`reward_model`: there is no folder 'a/b/c'"),
        (["--prompt_dataset=/none"], "`prompt_dataset`: there is no folder '/none'"),
    ],
    "plan": [
        (["--num_gpus=all"], "command line: `num_gpus` must be an integer, got 'all'."),
        (["--learning_rate=fast"], "command line: `learning_rate` must be a number, got 'fast'."),
        (["--offload_activations"], "`offload_activations` must be left out without `gradient_checkpointing`, got True."),
        (["--config=none.yaml"], "there is no file 'none.yaml'."),
        (["--pretrained_model_name_or_path=/none"], "`pretrained_model_name_or_path`: there is no folder '/none'"),
        (["--zero_stage=1"], "`zero_stage` must be 0, 2 or 3, got 1."),
        (["--context_parallel_degree=2"], "`context_parallel_degree` must be a divisor of `num_gpus`, 1, got 2."),
    ],
    "score": [
        (["--timesteps", "1", "x"], "command line: `timesteps` must be integers, got 'x'."),
        (["--manifest=clips.json"], "`manifest` must be given, or else `dataset`, and not both, got 'clips.json'."),
        (["--reward_model=/none"], "`reward_model`: there is no folder '/none'"),
    ],
    "generate": [
        (["--guidance_scale=high"], "command line: `guidance_scale` must be a number, got 'high'."),
        (["--lora_scale=0.5"], "`lora_scale` must be left out when there is no `lora_path` and no `lora_2_path`, got 0.5."),
        (["--transformer_path=clips.json"], "`transformer_path`: 'clips.json' is a file, not a folder."),
        (["--prompts=none.json"], "`prompts`: there is no file 'none.json'."),
        (["--lora_path=/none"], "`lora_path`: there is no file or folder '/none'"),
    ],
    "convert": [
        (["--text_len=long"], "command line: `text_len` must be an integer, got 'long'."),
        (["--lora=a"], "`lora` must be left out with `transformer`, got 'a'."),
        (["--transformer=none"], "`transformer`: there is no file or folder 'none'"),
    ],
    "convert_recipe": [
        (["--recipe_command=train"], "command line: `recipe_command` must be one of"),
        (["--output=new.json"], "`output` must be a .yaml file, got 'new.json'."),
        (["--config=none.yaml"], "there is no file 'none.yaml'."),
        (["--pretrained_model_name_or_path=./none"], "`pretrained_model_name_or_path`: there is no folder './none'"),
    ],
    "annotate": [
        (["--labels_per_clip=many"], "command line: `labels_per_clip` must be an integer, got 'many'."),
        (["--order=best"], "command line: `order` must be one of random, uncertain, manifest, got 'best'."),
        (["--manifest=none.json"], "`manifest`: there is no file 'none.json'."),
    ],
    "compare": [
        (["--criteria", "Motion"], "`criteria` must be lower case words joined by _, got 'Motion'."),
        (["--output=result.txt"], "`output` must be a .json file, got 'result.txt'."),
        (["--left=none"], "`left`: there is no file or folder 'none'"),
    ],
    "report": [
        (["--max_megabytes=big"], "command line: `max_megabytes` must be"),
        (["--run=none"], "`run`: there is no file or folder 'none'"),
    ],
    "push": [
        (["--private=perhaps"], "command line: `private` must be true or false, got 'perhaps'."),
        (["--folder=none"], "`folder`: there is no file or folder 'none'"),
    ],
    "pull": [
        (["--repo_type=space"], "command line: `repo_type` must be one of model, dataset, got 'space'."),
        (["--output_dir="], "`output_dir` must be a text that is not empty, or left out, got ''."),
    ],
}  # fmt: skip
# The files that `ACCEPTED` names.
RECIPE = "pretrained_model_name_or_path: wan\nupdate_schedule: alternate\n"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Function that runs a module in a folder with the files of `ACCEPTED`, and checks that it imported no library."""
    for name in ("wan", "data", "reward", "meta"):
        (tmp_path / name).mkdir()
    for name in ("clips.json", "prompts.json", "labels.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def run_module(
        module: str, *options: str, allowed: frozenset[str] = frozenset(), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, module, str(tmp_path / "imported"), *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        finished = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60)
        assert set((tmp_path / "imported").read_text().split()) <= allowed
        return finished

    return run_module


def error_line(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line of a process that ended with a mistake."""
    assert finished.returncode == EXIT_CODE, finished.stderr
    assert finished.stdout == ""
    assert finished.stderr.endswith("\n")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_every_command_is_here() -> None:
    assert set(COMMANDS) == set(ACCEPTED) == set(MISTAKES)


@pytest.mark.parametrize("command", sorted(ACCEPTED))
def test_help_waits_for_no_library(start: Callable[..., subprocess.CompletedProcess[str]], command: str) -> None:
    finished = start(f"hy_prfl.scripts.{command}", "--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "--config" in finished.stdout
    assert "HY_PRFL_TRACEBACK" in finished.stdout


@pytest.mark.parametrize("command", sorted(ACCEPTED))
def test_a_mistake_is_one_line(start: Callable[..., subprocess.CompletedProcess[str]], command: str) -> None:
    module = f"hy_prfl.scripts.{command}"
    for options, message in MISTAKES[command]:
        line = error_line(start(module, *ACCEPTED[command], *options))
        assert line.startswith(message), f"{options}: {line}"
    assert "'fromat' is not a field of " in error_line(start(module, *ACCEPTED[command], "--fromat=x"))
    assert "unrecognized arguments: stray" in error_line(start(module, "stray", *ACCEPTED[command]))
    line = error_line(start("hy_prfl.cli", command, *ACCEPTED[command], *MISTAKES[command][0][0]))
    assert line.startswith(MISTAKES[command][0][1])


def test_annotate_needs_no_torch(start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    # `datasets`, which does not load torch, has the column types of the labels.
    allowed = frozenset({"datasets"})
    line = error_line(start("hy_prfl.scripts.annotate", *ACCEPTED["annotate"], allowed=allowed))
    assert line.startswith("clips.json: ")
    options = ["--order=uncertain", "--scores", "clips.json", "none.csv"]
    line = error_line(start("hy_prfl.scripts.annotate", *ACCEPTED["annotate"], *options))
    assert line == "`scores`: there is no file 'none.csv'."
    # All of it: nothing that the page needs loads torch.
    (tmp_path / "clips.json").write_text(json.dumps([{"id": "a", "video": "a.mp4", "caption": "A cat."}]))
    (tmp_path / "a.mp4").write_bytes(b"")
    finished = start("hy_prfl.scripts.annotate", *ACCEPTED["annotate"], "--serve=false", allowed=allowed)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "labels.json").read_text())[0]["id"] == "a"


def test_compare_needs_no_torch(start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "wan" / "manifest.json").write_text("[]")
    (tmp_path / "data" / "manifest.json").write_text('[{"id": "a", "video": "a.mp4", "caption": "A cat."}]')
    (tmp_path / "data" / "a.mp4").write_bytes(b"")
    line = error_line(start("hy_prfl.scripts.compare", *ACCEPTED["compare"], allowed=frozenset({"datasets"})))
    assert "manifest.json" in line


@pytest.mark.parametrize("command", sorted(ACCEPTED))
def test_a_mistake_in_the_file_is_one_line(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, command: str
) -> None:
    module = f"hy_prfl.scripts.{command}"
    path = tmp_path / "bad.yaml"
    options = [*ACCEPTED[command], "--config=bad.yaml"]

    path.write_text("output_dir: out\nlearning_rate: [1\n")
    assert error_line(start(module, *options)).startswith("bad.yaml, line 3, column 1: not valid YAML: ")
    path.write_bytes(b"output_dir: \xff\n")
    assert error_line(start(module, *options)).startswith("bad.yaml: not valid YAML: ")
    path.write_text("- output_dir\n")
    assert error_line(start(module, *options)).startswith("bad.yaml: expected a mapping of ")
    path.write_text("seed: 1\nseed: 2\n")
    assert "line 2, column 1: not valid YAML: the key 'seed' appears twice" in error_line(start(module, *options))
    for name in ("none.yaml", "data"):
        assert error_line(start(module, *options, f"--config={name}")) == f"there is no file '{name}'."
    # What a recipe of upstream may hold is known to `convert_recipe` only, which reads all of it.
    if command != "convert_recipe":
        path.write_text("learning_rat: 1\n")
        assert error_line(start(module, *options)).startswith("bad.yaml: ")


def test_unknown_command(start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert error_line(start("hy_prfl.cli", "trian")).startswith("there is no command 'trian'; it is one of preprocess")


def test_traceback_by_a_variable(start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    finished = start("hy_prfl.scripts.pull", "--output_dir=out", HY_PRFL_TRACEBACK="1")
    assert finished.returncode == EXIT_CODE
    lines = finished.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: `repo_id` must be given."
    assert "Traceback" not in start("hy_prfl.scripts.pull", "--output_dir=out", HY_PRFL_TRACEBACK="0").stderr


def test_a_model_that_the_hub_was_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run off-line."""
    from diffusers import WanPipeline

    with pytest.raises(SystemExit):
        run(lambda: WanPipeline.load_config("some/model-that-nobody-has"))
    assert capsys.readouterr().err.splitlines()[-1].endswith("The Hub was not contacted: HF_HUB_OFFLINE is set.")


def raised(function: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function()
    return caught.value


def test_what_counts_as_a_mistake(tmp_path: Path, pipeline_dir: Path) -> None:
    from diffusers import WanPipeline

    from hy_prfl.data.annotations import read_annotations
    from hy_prfl.hub import HubError, pull

    (tmp_path / "labels.json").write_text("{")
    mistakes = [
        raised(lambda: check(False, "a", 1, "2")),
        raised(lambda: read_annotations(tmp_path / "none.csv")),
        raised(lambda: (tmp_path / "none").read_text()),
        raised(lambda: (tmp_path / "labels.json" / "x").mkdir()),
        raised(lambda: read_annotations(tmp_path / "labels.json")),
        raised(lambda: WanPipeline.from_pretrained(pipeline_dir, variant="none")),
        raised(lambda: pull("user/none", tmp_path / "out")),
    ]
    assert isinstance(mistakes[-1], HubError)
    assert [is_mistake(error) for error in mistakes] == [True] * len(mistakes)

    def unpack() -> None:
        _, _ = [1]

    def pass_on() -> None:
        raise OSError("Caught OSError in a worker.\nTraceback (most recent call last):\n  ...")

    functions = (
        unpack, pass_on, torch.distributed.get_world_size, lambda: int("x"), lambda: json.loads("{"), lambda: {}["a"]
    )  # fmt: skip
    bugs = [raised(function) for function in functions]
    assert [is_mistake(error) for error in bugs] == [False] * len(bugs)


def test_a_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise TypeError("wrong")

    with pytest.raises(TypeError, match="wrong"):
        run(fail)


@pytest.mark.launch
@pytest.mark.parametrize("command", ["train_prfl", "generate"])
def test_several_processes_say_it_once(tmp_path: Path, accelerate_launch: Callable[..., str], command: str) -> None:
    with pytest.raises(RuntimeError) as failed:
        accelerate_launch(command, "--output_dir", tmp_path / "out", "--learning_rat", 1, num_processes=2)
    output = str(failed.value)
    lines = [line for line in output.splitlines() if "is not a field" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: command line: 'learning_rat' is not a field of ")
    # What else is there is the launcher's own.
    assert "hy_prfl/scripts" not in output.replace("hy_prfl.scripts", "")


@pytest.mark.launch
def test_a_mistake_of_one_process_ends_all(tmp_path: Path) -> None:
    """The first process waits for the other in a collective, and does not fail itself."""
    (tmp_path / "program.py").write_text(
        "import os, torch\n"
        "from hy_prfl.configs.base import check\n"
        "from hy_prfl.scripts import running\n"
        "def main():\n"
        "    torch.distributed.init_process_group('gloo')\n"
        "    check(os.environ['RANK'] == '0', 'row', 7, 'readable')\n"
        "    torch.distributed.barrier()\n"
        "running.PATIENCE = 2\n"
        "running.run(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    assert finished.returncode != 0
    assert finished.stderr.count("error: `row` must be readable, got 7.") == 1


@pytest.mark.parametrize(
    ("rank", "local_rank", "patience"),
    [(0, 0, 0.0), (1, 1, 20.0), (7, 7, 20.0), (8, 0, 20.0), (9, 1, 40.0)],
)
def test_the_first_process_speaks_before_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, local_rank: int, patience: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as stopped:
        run(lambda: check(False, "seed", 1, "2"))
    assert stopped.value.code == EXIT_CODE
    assert sum(waited) == patience
    assert capsys.readouterr().err == "error: `seed` must be 2, got 1.\n"
