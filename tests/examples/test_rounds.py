"""Rounds of PRFL: what each command is given, which videos are held out, whose labels count, and one round for real."""

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from examples import rounds as rounds_module
from examples.rounds import (
    LabelsMissingError,
    Rounds,
    RoundsConfig,
    held_out_prompts,
    read_captions,
    read_verdicts,
    tuned_files,
    tuned_options,
)
from examples.rounds import main as rounds_main
from examples.rounds_page import write_page
from examples.shapes.clips import ClipsConfig, split_captions, write_clips
from examples.shapes.pretrain import PRETRAINED_DIR
from examples.stages import Stage
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.scripts.preprocess import main as preprocess


ROOT = Path(__file__).parents[2]
DONE = Stage("done", "done", [], [])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RoundsConfig]:
    """Function that makes options of rounds in the small world, with others on top."""
    monkeypatch.chdir(ROOT)
    prompts = [{"id": str(index), "caption": str(caption)} for index, caption in enumerate(split_captions("train"))]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))

    def build(**options: Any) -> RoundsConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "recipes": "examples/shapes",
            "accelerate_config": "accelerate_configs/cpu.yaml",
            "train_dataset": ["data/labelled"],
            "validation_dataset": ["data/held_out"],
            "reward_model": "reward",
            "generator": "prfl",
            "prompts": str(tmp_path / "prompts.json"),
            "num_videos": 10,
        }
        return RoundsConfig(**(defaults | options))

    return build


def option(words: list[str], name: str) -> list[str]:
    """Values of the last option of this name in a command line."""
    first = len(words) - words[::-1].index(f"--{name}")
    after = next((index for index in range(first, len(words)) if words[index].startswith("--")), len(words))
    return words[first:after]


def test_every_reward_model_learns_from_all_labels_so_far(config: Callable[..., RoundsConfig], tmp_path: Path) -> None:
    rounds = Rounds(config(train_dataset_weights=[0.5], round_weight=2.0, reward_steps=[4, 6], warm_start=True))
    folders = [str(tmp_path / f"out/rounds/{number}/latents/round_{number}") for number in (1, 2)]
    words = rounds._reward_options(2, "out")
    assert option(words, "train_dataset") == ["data/labelled", *folders]
    assert option(words, "train_dataset_weights") == ["0.5", "2.0", "2.0"]
    assert option(words, "validation_dataset") == ["data/held_out", *(f"{folder}_held_out" for folder in folders)]
    assert option(words, "reward_model") == [str(tmp_path / "out/rounds/1/reward/best")]
    assert [option(rounds._reward_options(number, "out"), "max_train_steps") for number in (0, 1, 2)] == [
        ["4"],
        ["6"],
        ["6"],
    ]
    assert option(rounds._reward_options(1, "out"), "reward_model") == ["reward"]
    fresh = Rounds(config())
    assert "--reward_model" not in fresh._reward_options(2, "out")
    assert "--max_train_steps" not in fresh._reward_options(2, "out")
    # The generator starts from the base each time, with the reward model of its round.
    assert option(fresh._prfl_stage(2, []).commands[0], "reward_model") == [str(tmp_path / "out/rounds/2/reward/best")]
    assert "--lora_path" not in fresh._prfl_stage(2, []).commands[0]


def test_the_generator_is_tuned_on_the_reward_models_of_the_last_rounds(
    config: Callable[..., RoundsConfig], tmp_path: Path
) -> None:
    rounds = Rounds(config(ensemble_rounds=2, reward_disagreement=0.25))
    own = [str(tmp_path / f"out/rounds/{number}/reward/best") for number in (1, 2)]
    commands = [rounds._prfl_stage(number, []).commands[0] for number in (0, 1, 2)]
    assert option(commands[0], "reward_model") == ["reward"]
    assert "--reward_disagreement" not in commands[0]
    assert option(commands[1], "reward_models") == [own[0], "reward"]
    assert option(commands[2], "reward_models") == [own[1], own[0]]
    assert option(commands[2], "reward_disagreement") == ["0.25"]
    for command in commands[1:]:
        parsed = parse_config(PRFLTrainingConfig, command[command.index("--config") :])
        assert len(parsed.reward_models or []) == 2


def test_options_on_top_of_recipes(config: Callable[..., RoundsConfig]) -> None:
    chosen = config(train_prfl_options=["reward_at=foreseen", "foreseen_levels=0.3 0.5"])
    assert Rounds(chosen).prfl_config.foreseen_levels == [0.3, 0.5]
    assert Rounds(chosen).prfl_config.lora_rank == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_prfl_options": ["reward_model=x"]}, "`train_prfl_options` must be without output_dir, resume"),
        ({"train_prfl_options": ["max_train_steps"]}, "must be name=value, got 'max_train_steps'"),
        ({"train_prfl_options": ["max_train_stepz=4"]}, "'max_train_stepz' is not a field of PRFLTrainingConfig"),
        ({"train_prfl_options": ["lora_path=x", "lora_start=merge"]}, "`lora_path` must be left out of `train_prfl`"),
        (
            {"train_prfl_options": ["on_hacking=stop", "validation_dataset=x"]},
            "`on_hacking` must be warn or keep_best in `train_prfl`",
        ),
        ({"generate_options": ["num_frames=16"]}, "`num_frames` must be 4k"),
        ({"recipes": None}, "`generate_recipe` must be given, or `recipes`"),
        ({"recipes": "nowhere"}, "`generate_recipe`: there is no file 'nowhere/generate.yaml'"),
        ({"judge": "python judge.py {manifest}"}, "`judge` must be a command with {output}"),
        ({"evaluation_prompts": "x.json"}, "`evaluation_prompts` must be left out without `judge`"),
        ({"ensemble_rounds": 0}, "`ensemble_rounds` must be at least 1"),
        ({"num_videos": 1}, "`num_videos` must be at least 2"),
        ({"train_dataset_weights": [1.0, 2.0]}, "`train_dataset_weights` must be a number for each of the 1"),
    ],
)
def test_mistakes_end_before_anything_is_run(
    config: Callable[..., RoundsConfig], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Rounds(config(**options))


def test_the_same_prompts_are_held_out_in_all_rounds(config: Callable[..., RoundsConfig]) -> None:
    rounds = Rounds(config(num_videos=20, seed=3))
    assert len(rounds.held_out) == round(0.2 * 168)
    written = [json.loads(rounds._write_prompts(number).read_text()) for number in (1, 2)]
    for number, rows in enumerate(written, 1):
        assert sum(row["caption"] in rounds.held_out for row in rows) == 4
        assert rows[0]["id"] == f"round_{number}_00000"
    rows = [row for part in written for row in part]
    # Other prompts and other noise in each round.
    assert len({row["caption"] for row in rows}) == len({row["seed"] for row in rows}) == 40


def test_prompts_are_read_from_lists_and_manifests(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    assert read_captions(tmp_path / "a.txt") == [{"caption": "one"}, {"caption": "two"}]
    (tmp_path / "first.png").write_bytes(b"")
    rows = [{"id": "x", "video": "x.mp4", "caption": "one", "failure": None, "image": "first.png"}]
    (tmp_path / "manifest.json").write_text(json.dumps(rows))
    assert read_captions(tmp_path / "manifest.json") == [{"caption": "one", "image": str(tmp_path / "first.png")}]
    prompts = [{"caption": word} for word in "abcdefgh"]
    assert held_out_prompts(prompts, 0.25) == held_out_prompts(prompts[::-1], 0.25)
    assert len(held_out_prompts(prompts[:2], 0.9)) == len(held_out_prompts(prompts[:2], 0.1)) == 1


def written_videos(rounds: Rounds) -> list[dict[str, Any]]:
    """The manifest of a first round of videos; no file is read."""
    prompts = json.loads(rounds._write_prompts(1).read_text())
    rows = [{**row, "id": f"{row['id']}_seed_{row['seed']}", "video": f"{row['id']}.mp4"} for row in prompts]
    folder = rounds.folder(1) / "videos"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(rows))
    return rows


def test_without_a_judge_it_stops_and_says_what_to_run(config: Callable[..., RoundsConfig], tmp_path: Path) -> None:
    rounds = Rounds(config(min_labelled=0.8))
    rows = written_videos(rounds)
    manifest, labels = rounds.folder(1) / "videos" / "manifest.json", rounds.folder(1) / "labels.json"
    command = f"hy-prfl annotate --manifest {manifest} --output {labels} --tasks physics_quality human_quality"
    with pytest.raises(LabelsMissingError, match="0 of 10 videos have a label") as stopped:
        rounds._labels(1, DONE)
    assert command in str(stopped.value)
    # Half done: it stops again. With one unsure and one missing it goes on.
    judged = [{"id": row["id"], "physics_quality": 1, "human_quality": index % 2} for index, row in enumerate(rows)]
    labels.write_text(json.dumps(judged[:5]))
    with pytest.raises(LabelsMissingError, match="5 of 10 videos"):
        rounds._labels(1, DONE)
    labels.write_text(json.dumps([{**judged[0], "human_quality": None}, *judged[1:9]]))
    counts = rounds._labels(1, DONE)
    assert (counts["num_videos"], counts["num_labelled"], counts["num_good"]) == (10, 8, 4)
    parts = {name: json.loads((rounds.folder(1) / f"{name}.json").read_text()) for name in ("train", "held_out")}
    assert [len(part) for part in parts.values()] == [8, 2]
    assert {row["caption"] for row in parts["held_out"]} <= rounds.held_out
    assert not {row["caption"] for row in parts["train"]} & rounds.held_out
    assert parts["train"][1]["human_quality"] == 1
    assert parts["train"][0]["human_quality"] is None
    assert parts["train"][0]["video"] == "videos/round_1_00000.mp4"
    # Labels are never made to belong to other videos.
    with pytest.raises(ValueError, match=r"labels.json' has labels of videos that would be made again"):
        rounds._videos_stage(1, [])
    (rounds.folder(1) / "labels.csv").write_text("id,human_quality\n")
    with pytest.raises(ValueError, match="both have labels of round 1"):
        rounds._labels(1, DONE)


def test_labels_of_other_videos_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,physics_quality,kind\na,1,good\nb,poor,frozen\n")
    found = read_verdicts(path, ["a", "b", "c"])
    assert [found[name]["physics_quality"] for name in "ab"] == [1, 0]
    assert found["b"]["kind"] == "frozen"
    with pytest.raises(ValueError, match=r"labels.csv, line 3: `id` 'b' is none of the round's videos, such as 'a'"):
        read_verdicts(path, ["a"])
    path.write_text("id,physics_quality\na,1\na,1\n")
    with pytest.raises(ValueError, match="`id` 'a' has a row already"):
        read_verdicts(path, ["a"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_rank": 4}, ["--lora_path", "f"]),
        ({}, ["--transformer_path", "f/transformer"]),
        ({"expert": "low_noise"}, ["--transformer_2_path", "f/transformer_2"]),
        ({"expert": "both", "lora_rank": 4}, ["--lora_path", "f", "--lora_2_path", "f"]),
    ],
)
def test_what_train_prfl_has_written_is_what_generate_is_given(options: dict[str, Any], expected: list[str]) -> None:
    config = PRFLTrainingConfig(
        output_dir="f", pretrained_model_name_or_path="p", train_dataset="d", reward_model="r", **options
    )
    assert tuned_options(config, Path("f")) == expected
    adapters = ["f/pytorch_lora_weights.safetensors", "f/pytorch_lora_weights_2.safetensors"]
    files = adapters[: len(expected) // 2] if "lora_rank" in options else expected[1::2]
    assert [str(path) for path in tuned_files(config, Path("f"))] == files


def test_the_page_shows_the_figures_of_all_rounds(config: Callable[..., RoundsConfig], tmp_path: Path) -> None:
    evaluation = {"num_videos": 4, "num_good": 1, "kinds": {"good": 1, "beyond": 3}}
    figures = {"auc": 0.512, "accuracy": 0.5}
    first = {
        "round": 1,
        "labels": {
            "num_videos": 10, "num_labelled": 8, "num_good": 4, "num_train": 6, "num_held_out": 2, "kinds": {"frozen": 4},
        },
        "num_labels": 1234,
        "new_videos": {"before": figures, "after": {**figures, "auc": None}},
        "validation_auc": {"held_out": 0.875},
        "training_reward": 0.777,
        "evaluation": {**evaluation, "num_good": 3},
    }  # fmt: skip
    results = {"task": "motion_quality", "rounds": [{"round": 0}, first], "seconds": {"1_videos": 12.3}}
    page = write_page(tmp_path, {**results, "rounds": [{"round": 0}]}, config(), num_videos=0).read_text()
    assert "Round" not in page.split("Configuration")[0].split("</h1>")[1]
    for name in ("base", "rounds/1"):
        folder = tmp_path / name / "evaluation"
        (folder / "videos").mkdir(parents=True)
        (folder / "videos" / "a.mp4").write_bytes(name.encode())
        row = {"id": "a", "caption": "<a circle>", "seed": 7, "video": "a.mp4"}
        (folder / "videos" / "manifest.json").write_text(json.dumps([row]))
        (folder / "labels.json").write_text(json.dumps([{"id": "a", "kind": "beyond"}]))
    results["rounds"] = [{"round": "base", "evaluation": evaluation}, *results["rounds"]]
    page = write_page(tmp_path, results, config(), num_videos=1).read_text()
    for text in (
        "1234",
        "0.512",
        "0.875",
        "0.777",
        "50 %",
        "25 %",
        "75 %",
        "beyond",
        "&lt;a circle&gt;",
        "base, before",
    ):
        assert text in page, text
    assert page.count("data:video/mp4") == 2
    assert "http" not in page.replace("http://www.w3.org", "")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.launch
def test_a_round_for_real(
    config: Callable[..., RoundsConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """People's labels are missing at first; then a judge has them, and what was done is not done again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_clips(ClipsConfig(output_dir=str(tmp_path / "clips"), num_clips=8))
    labelled = str(tmp_path / "labelled")
    manifest = f"--manifest={tmp_path / 'clips' / 'manifest.json'}"
    preprocess(["--config=examples/shapes/preprocess.yaml", manifest, f"--output_dir={labelled}"])
    transformer = WanTransformer3DModel.from_pretrained(PRETRAINED_DIR, subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    WanPipeline.save_lora_weights(tmp_path / "tuned", get_peft_model_state_dict(transformer))
    short = ["max_train_steps=2", "train_batch_size=2", "report_to=none", "write_report=false"]
    words = [
        *("--recipes", "examples/shapes", "--num_rounds", "1"),
        *("--output_dir", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.json"), "--num_videos", "8"),
        *("--train_dataset", labelled, "--validation_dataset", labelled),
        # The generator of round 0 is given, and its reward model is not.
        *("--generator", str(tmp_path / "tuned")),
        *("--held_out_share", "0.5", "--generate_options", "num_inference_steps=2"),
        *("--train_reward_options", *short, "lr_warmup_steps=0", "num_layers=2"),
        *("--train_prfl_options", *short, "num_inference_steps=3", f"train_dataset={labelled}", "reward_at=foreseen"),
    ]
    config()
    with pytest.raises(SystemExit, match="0 of 8 videos have a label"):
        rounds_main(words)
    capfd.readouterr()
    rounds_main([*words, "--judge", "python -m examples.shapes.annotate --manifest {manifest} --output {output}"])
    shown = capfd.readouterr().out
    assert "Round 1: make videos with the generator of round 0: complete" in shown
    assert shown.count("$ python -m hy_prfl.scripts.") == 5

    root = tmp_path / "out"
    results = json.loads((root / "rounds.json").read_text())
    found = results["rounds"][-1]
    judged = json.loads((root / "rounds/1/labels.json").read_text())
    good = {row["id"]: row["physics_quality"] * row["human_quality"] for row in judged}
    assert found["labels"]["num_good"] == sum(good.values())
    assert found["num_labels"] == 8 + 4
    assert sum(found["labels"]["kinds"].values()) == 8
    rows = load_from_disk(root / "rounds/1/latents/round_1_held_out").to_list()
    assert {row["id"]: row["physics_quality"] * row["human_quality"] for row in rows}.items() <= good.items()
    correct = [
        int(float(row["logit_t500"]) > 0) == int(row["label"]) for row in read_csv(root / "rounds/1/scores/before.csv")
    ]
    before = json.loads((root / "rounds/1/scores/before.csv.summary.json").read_text())
    assert before["metrics"]["accuracy/t500"] == sum(correct) / 4
    assert found["new_videos"]["before"]["accuracy"] == before["metrics"]["accuracy"]
    best = json.loads((root / "rounds/1/reward/best/metrics.json").read_text())
    assert found["new_videos"]["after"]["accuracy"] == best["round_1_held_out/accuracy"]
    assert (root / "rounds/1/prfl/pytorch_lora_weights.safetensors").is_file()
    assert "round 1" in (root / "rounds.html").read_text()


def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that `Rounds` checks before the first stage, but for files that are not shipped."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    text = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("python -m examples.rounds")]
    commands += [shlex.split(line)[4:] for line in text.splitlines() if line.startswith("OMP_NUM_THREADS")]
    assert len(commands) == 2
    assert rounds_module.__doc__ is not None
    for words in commands:
        Rounds(parse_config(RoundsConfig, [*words, "--prompts", str(tmp_path / "prompts.txt")]))
        assert " ".join(words) in " ".join(rounds_module.__doc__.replace("\\\n", " ").replace('"', "").split())
