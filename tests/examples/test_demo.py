"""The demo is the chain of the entry points, on captions and seeds that are kept apart."""

import json
from pathlib import Path

import pytest

from examples.shapes.clips import split_captions
from examples.shapes.demo import DemoConfig, plan, write_prompts


def test_the_plan_is_the_chain_of_the_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    stages = plan(DemoConfig(output_dir=str(tmp_path)))
    modules = [
        command[command.index("--config") - 1] for one in stages for command in one.commands if "--config" in command
    ]
    verbs = [module.removeprefix("hy_prfl.scripts.") for module in modules]
    assert verbs == [
        *["preprocess"] * 3, "train_reward", *["train_prfl"] * 2, *["generate"] * 3, *["score"] * 3,
    ]  # fmt: skip
    assert len({one.digest() for one in stages}) == len(stages)


def test_prompts_are_captions_of_their_split_with_seeds_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_prompts(tmp_path / "prompts.json", split, 30, first_seed=7)
        rows = json.loads((tmp_path / "prompts.json").read_text())
        assert {row["caption"] for row in rows} <= {str(caption) for caption in split_captions(split)}
        assert [row["seed"] for row in rows] == list(range(7, 37))
        assert len({row["id"] for row in rows}) == 30


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_prompts` must be"):
        DemoConfig(num_prompts=0)
