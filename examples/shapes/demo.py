"""
Runs the whole method on small videos, in a few minutes on a CPU: `make demo`, or

    python -m examples.shapes.demo

It starts from the pretrained pipeline in this folder, which generates good and bad videos of moving shapes. A reward model
is trained on noisy latents of clips that are labelled good or bad (PAVRM). The generator is fine-tuned on that reward
(PRFL, LoRA). For comparison, it is also fine-tuned for as many updates without a reward. Then the judge, which never uses
the reward model, labels new videos of held-out captions. Every stage is a command that is also used for the 14B model, with
a recipe from this folder. Completed stages are not run again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.shapes.clips import split_captions
from examples.shapes.judge import write_json
from examples.shapes.pretrain import clips_options
from examples.shapes.report import ARMS
from examples.shapes.stages import Stage, StageError, launch, python, run_stages
from examples.shapes.summary import finish
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config


# Number of labelled clips with held-out captions. The reward model is validated on them, PRFL on their captions.
NUM_HELD_OUT = 96


@dataclass(kw_only=True)
class DemoConfig:
    """Options of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for all outputs of the demo."})
    fresh: bool = field(default=False, metadata={"help": "Run all stages again, also completed ones."})
    pipeline: str = field(default="examples/shapes/pretrained", metadata={"help": "The pretrained pipeline."})
    num_labelled_clips: int = field(default=2048, metadata={"help": "Clips with labels, for the reward model."})
    num_clips: int = field(default=256, metadata={"help": "Clips for flow matching, like those of the pretraining."})
    num_prompts: int = field(
        default=48, metadata={"help": "Videos of held-out captions to judge, for each generator."}
    )
    reward_steps: int | None = field(
        default=None, metadata={"help": "Updates of the reward model; those of the recipe if left out."}
    )
    prfl_steps: int = field(default=80, metadata={"help": "Steps of PRFL, of two updates each."})
    seed: int = field(default=0, metadata={"help": "Seed of clips, videos and training."})

    def __post_init__(self) -> None:
        for name in ("num_labelled_clips", "num_clips", "num_prompts", "prfl_steps"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def plan(config: DemoConfig) -> list[Stage]:
    """All stages, in order."""
    root = Path(config.output_dir)
    base = ["--pretrained_model_name_or_path", config.pipeline]
    seed = ["--seed", str(config.seed)]
    best = ["--reward_model", str(root / "reward" / "best")]
    # Options of each set of clips: number and seed. The captions of `held_out` are in no other set.
    clips = {
        "labelled": [str(config.num_labelled_clips), "--good_share", "0.5", "--seed", str(3 * config.seed)],
        "train": [str(config.num_clips), *clips_options(), "--seed", str(3 * config.seed + 1)],
        "held_out": [str(NUM_HELD_OUT), "--split", "held_out", "--seed", str(3 * config.seed + 2)],
    }
    manifests = {name: root / "clips" / name / "manifest.json" for name in clips}
    latents = {name: str(root / "latents" / name) for name in manifests}
    # A step of PRFL has two updates. The two processes share the recipes' batches.
    steps = {"flow_matching": 2 * config.prfl_steps, "prfl": config.prfl_steps}
    schedules = {"flow_matching": "flow_matching", "prfl": "alternate"}
    tuned = {
        arm: [
            *("--train_dataset", latents["train"], "--validation_dataset", latents["held_out"]),
            *("--output_dir", str(root / arm), "--update_schedule", schedules[arm]),
            *("--max_train_steps", str(number), "--validation_steps", str(max(1, number // 4)), *seed),
            *("--train_batch_size", "4"),
        ]
        for arm, number in steps.items()
    }
    lora = {"base": [], **{arm: ["--lora_path", str(root / arm)] for arm in steps}}
    videos = {arm: root / "videos" / arm for arm in ARMS}
    return [
        Stage(
            "clips",
            "write mp4 clips with captions and labels",
            [
                python("clips", ["--output_dir", str(root / "clips" / name), "--num_clips", *options])
                for name, options in clips.items()
            ],
            ["clips"],
        ),
        Stage(
            "preprocess",
            "encode the clips",
            [
                launch(
                    "preprocess",
                    [*base, "--manifest", str(manifest), "--output_dir", latents[name]],
                    two_processes=True,
                )
                for name, manifest in manifests.items()
            ],
            ["latents"],
        ),
        Stage(
            "train_reward",
            "train the reward model",
            [
                launch(
                    "train_reward",
                    [*base, "--train_dataset", latents["labelled"], "--output_dir", str(root / "reward"), *seed]
                    + ["--validation_dataset", latents["held_out"], *steps_option(config.reward_steps)]
                    + ["--train_batch_size", "16"],
                    two_processes=True,
                )
            ],
            ["reward"],
        ),
        *[
            Stage(arm, title, [launch("train_prfl", [*base, *best, *tuned[arm]], two_processes=True)], [arm])
            for arm, title in (
                ("flow_matching", "tune the generator without a reward"),
                ("prfl", "tune the generator on the reward"),
            )
        ],
        Stage(
            "generate",
            "videos of held-out captions, the same seeds for all",
            [generate([*base, *lora[arm]], root / "prompts.json", videos[arm]) for arm in ARMS],
            ["videos"],
        ),
        Stage(
            "judge",
            "judge them by their pixels",
            [
                python("judge", ["--manifest", str(videos[arm] / "manifest.json")])
                + ["--output", str(root / "verdicts" / f"{arm}.json")]
                for arm in ARMS
            ],
            ["verdicts"],
        ),
        Stage(
            "score",
            "score them with the reward model",
            [
                launch(
                    "score",
                    [*base, *best, "--manifest", str(videos[arm] / "manifest.json")]
                    + ["--output", str(root / "scores" / f"{arm}.csv")],
                    two_processes=True,
                )
                for arm in ARMS
            ],
            ["scores"],
        ),
    ]


def generate(options: list[str], prompts: Path, output_dir: Path) -> list[str]:
    options = [*options, "--prompts", str(prompts), "--output_dir", str(output_dir)]
    return launch("generate", options, two_processes=True)


def steps_option(steps: int | None) -> list[str]:
    return [] if steps is None else ["--max_train_steps", str(steps)]


def write_prompts(
    path: Path, split: Literal["train", "held_out"], num_prompts: int, first_seed: int, prefix: str = ""
) -> None:
    """Write prompts for `generate`: captions of a split in turn, each with its own seed. An id is `prefix` and a number."""
    captions = split_captions(split)
    rows = [
        {"id": f"{prefix}{index:04d}", "caption": str(captions[index % len(captions)]), "seed": first_seed + index}
        for index in range(num_prompts)
    ]
    write_json(path, rows)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(DemoConfig, argv, description=__doc__)
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    write_prompts(root / "prompts.json", "held_out", config.num_prompts, first_seed=1000 * (config.seed + 1))
    try:
        seconds = run_stages(plan(config), root, config.fresh)
    except StageError as error:
        sys.exit(f"demo: {error}")
    finish(root, seconds)


if __name__ == "__main__":
    main()
