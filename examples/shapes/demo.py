"""
Runs the whole method on small videos, in a few minutes on a CPU: `make demo`, or

    python -m examples.shapes.demo

It starts from the pretrained pipeline in this folder, which generates good and bad videos of moving shapes. A reward model
is trained on noisy latents of clips that are labelled good or bad (PAVRM). The generator is fine-tuned on that reward
(PRFL, LoRA). For comparison, it is also fine-tuned for as many updates without a reward. Then comes a round: new videos of
the tuned generator are labelled, the reward model learns from what still fails in them, and the pretrained generator is
tuned again, on both reward models. In the end the judge, which never uses the reward model, looks at videos of held-out
captions. Every stage is a command that is also used for the 14B model, with a recipe from this folder. Completed stages are
not run again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.shapes.clips import split_captions
from examples.shapes.judge import write_json
from examples.shapes.report import ARMS
from examples.shapes.stages import Stage, launch, python
from examples.shapes.summary import finish
from examples.stages import StageError, run_stages
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config


# Number of labelled clips with held-out captions. The reward model is validated on them, PRFL on their captions.
NUM_HELD_OUT = 96
# What `annotate` splits the labelled videos of a round into.
ROUND_SPLITS = ("train", "validation")
# How often a video of the round is drawn while a clip is drawn once.
ROUND_WEIGHT = "2"


@dataclass(kw_only=True)
class DemoConfig:
    """Options of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for all outputs of the demo."})
    fresh: bool = field(default=False, metadata={"help": "Run all stages again, also completed ones."})
    pipeline: str = field(default="examples/shapes/pretrained", metadata={"help": "The pretrained pipeline."})
    num_labelled_clips: int = field(default=1024, metadata={"help": "Clips with labels, for the reward model."})
    num_clips: int = field(default=256, metadata={"help": "Good clips for flow matching."})
    num_prompts: int = field(
        default=48, metadata={"help": "Videos of held-out captions to judge, for each generator."}
    )
    reward_steps: int = field(default=300, metadata={"help": "Updates of the reward model, and again in the round."})
    num_round_videos: int = field(default=256, metadata={"help": "Videos of the tuned generator that get labels."})
    prfl_steps: int = field(default=120, metadata={"help": "Steps of PRFL, of two updates each."})
    seed: int = field(default=0, metadata={"help": "Seed of clips, videos and training."})

    def __post_init__(self) -> None:
        for name in (
            "num_labelled_clips",
            "num_clips",
            "num_prompts",
            "num_round_videos",
            "reward_steps",
            "prfl_steps",
        ):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def plan(config: DemoConfig) -> list[Stage]:
    """All stages, in order."""
    root = Path(config.output_dir)
    base = ["--pretrained_model_name_or_path", config.pipeline]
    # Options of each set of clips: number and seed. The captions of `held_out` are in no other set.
    clips = {
        "labelled": [str(config.num_labelled_clips), "--good_share", "0.5", "--seed", str(3 * config.seed)],
        "train": [str(config.num_clips), "--good_share", "1", "--seed", str(3 * config.seed + 1)],
        "held_out": [str(NUM_HELD_OUT), "--split", "held_out", "--seed", str(3 * config.seed + 2)],
    }
    lora = {arm: [] if arm == "base" else ["--lora_path", str(root / arm)] for arm in ARMS}
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
            [encode(config, root / "clips" / name / "manifest.json", name) for name in clips],
            ["latents"],
        ),
        Stage("reward", "train the reward model", [train_reward(config)], ["reward"]),
        Stage(
            "flow_matching",
            "tune the generator without a reward",
            [train_prfl(config, "flow_matching", "flow_matching", 2 * config.prfl_steps, ["reward"])],
            ["flow_matching"],
        ),
        Stage("prfl", "tune the generator on the reward", [tune_on(config, "prfl", ["reward"])], ["prfl"]),
        Stage(
            "round_videos",
            "a round: label new videos of this generator",
            [
                generate([*base, *lora["prfl"]], root / "round_prompts.json", root / "round_videos"),
                python("annotate", ["--manifest", str(root / "round_videos" / "manifest.json")])
                + ["--output_dir", str(root / "round_labels")],
                *[encode(config, root / "round_labels" / f"{name}.json", f"round_{name}") for name in ROUND_SPLITS],
            ],
            ["round_videos", "round_labels", *(f"latents/round_{name}" for name in ROUND_SPLITS)],
        ),
        Stage("round_reward", "the reward model learns from them", [learn_on(config)], ["round_reward"]),
        Stage(
            "round",
            "tune the pretrained generator again",
            [tune_on(config, "round", ["round_reward", "reward"])],
            ["round"],
        ),
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
            "score them with the first reward model",
            [
                launch(
                    "score",
                    [*base, "--reward_model", str(root / "reward" / "best")]
                    + ["--manifest", str(videos[arm] / "manifest.json")]
                    + ["--output", str(root / "scores" / f"{arm}.csv")],
                    two_processes=True,
                )
                for arm in ARMS
            ],
            ["scores"],
        ),
    ]


def encode(config: DemoConfig, manifest: Path, name: str) -> list[str]:
    """Command that writes the latent dataset of a manifest."""
    options = ["--manifest", str(manifest), "--output_dir", str(latents(config, name))]
    return launch("preprocess", ["--pretrained_model_name_or_path", config.pipeline, *options], two_processes=True)


def latents(config: DemoConfig, name: str) -> Path:
    return Path(config.output_dir) / "latents" / name


def train_reward(config: DemoConfig) -> list[str]:
    """Command that trains the first reward model, on the labelled clips."""
    options = [
        *("--pretrained_model_name_or_path", config.pipeline, "--seed", str(config.seed)),
        *("--train_dataset", str(latents(config, "labelled"))),
        *("--validation_dataset", str(latents(config, "held_out"))),
        *("--output_dir", str(Path(config.output_dir) / "reward")),
        *("--max_train_steps", str(config.reward_steps), "--checkpointing_steps", str(config.reward_steps)),
    ]
    return launch("train_reward", [*options, "--train_batch_size", "16"], two_processes=True)


def learn_on(config: DemoConfig) -> list[str]:
    """Command that trains this reward model further, on the videos of the round beside the clips."""
    options = [
        *("--reward_model", str(Path(config.output_dir) / "reward" / "best"), "--seed", str(config.seed)),
        *("--train_dataset", str(latents(config, "labelled")), str(latents(config, "round_train"))),
        *("--train_dataset_weights", "1", ROUND_WEIGHT),
        *("--validation_dataset", str(latents(config, "held_out")), str(latents(config, "round_validation"))),
        *("--output_dir", str(Path(config.output_dir) / "round_reward")),
        *("--max_train_steps", str(config.reward_steps), "--checkpointing_steps", str(config.reward_steps)),
    ]
    return launch("train_reward", [*options, "--train_batch_size", "16"], two_processes=True)


def tune_on(config: DemoConfig, run: str, rewards: list[str]) -> list[str]:
    """Command that tunes the pretrained generator with PRFL on one or more reward models."""
    return train_prfl(config, run, "alternate", config.prfl_steps, rewards)


def train_prfl(config: DemoConfig, run: str, schedule: str, num_steps: int, rewards: list[str]) -> list[str]:
    """Command that tunes the pretrained generator. The two processes share the recipe's batch."""
    root = Path(config.output_dir)
    options = [
        *("--pretrained_model_name_or_path", config.pipeline, "--seed", str(config.seed)),
        *("--reward_models", *(str(root / reward / "best") for reward in rewards), "--update_schedule", schedule),
        *("--train_dataset", str(latents(config, "train"))),
        *("--validation_dataset", str(latents(config, "held_out"))),
        *("--output_dir", str(root / run), "--max_train_steps", str(num_steps)),
        *("--validation_steps", str(max(1, num_steps // 2)), "--train_batch_size", "4"),
    ]
    if len(rewards) > 1:
        # What they disagree by is not to be trusted.
        options += ["--reward_disagreement", "0.5"]
    if schedule == "flow_matching":
        # There is no rollout to reuse.
        options += ["--rollout_interval", "1", "--rollout_buffer_size", "1"]
    return launch("train_prfl", options, two_processes=True)


def generate(options: list[str], prompts: Path, output_dir: Path) -> list[str]:
    options = [*options, "--prompts", str(prompts), "--output_dir", str(output_dir)]
    return launch("generate", options, two_processes=True)


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
    first_seed = 1_000_000 * (config.seed + 1)
    write_prompts(root / "round_prompts.json", "train", config.num_round_videos, first_seed=first_seed)
    try:
        seconds = run_stages(plan(config), root, config.fresh)
    except StageError as error:
        sys.exit(f"demo: {error}")
    finish(root, seconds)


if __name__ == "__main__":
    main()
