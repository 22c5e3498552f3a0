"""
The whole method on small videos, in a few minutes on a CPU: `make demo`, or

    python -m examples.shapes.demo

Clips of moving shapes -> a tiny Wan pipeline -> latents -> reward model (PAVRM) -> generator tuned on it (PRFL, LoRA)
-> videos before and after, and their scores. After the pretraining every stage is a command that a user of the 14B
model types as well, with a recipe of this folder. Stages that are complete are not run again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.shapes.clips import FPS, NUM_FRAMES, split_captions
from examples.shapes.judge import write_json
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.video import read_video


RECIPES = Path("examples/shapes")
ONE_PROCESS, TWO_PROCESSES = Path("accelerate_configs/cpu.yaml"), Path("accelerate_configs/ddp_cpu.yaml")
SHARED_OUT = ("preprocess", "generate", "score")


@dataclass(kw_only=True)
class DemoConfig:
    """Size of the demo."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder for everything the demo makes."})
    fresh: bool = field(default=False, metadata={"help": "Run all stages again, also those that are complete."})
    num_clips: int = field(default=384, metadata={"help": "Labelled clips to train on."})
    num_held_out_clips: int = field(default=96, metadata={"help": "Labelled clips with held-out captions."})
    num_prompts: int = field(default=24, metadata={"help": "Held-out captions to generate videos for, at most 24."})
    vae_steps: int = field(default=950, metadata={"help": "Updates of the VAE's pretraining."})
    generator_steps: int = field(default=700, metadata={"help": "Updates of the generator's pretraining."})
    reward_steps: int | None = field(
        default=None, metadata={"help": "Updates of the reward model, if not the recipe's."}
    )
    prfl_steps: int | None = field(default=None, metadata={"help": "Updates of PRFL, if not the recipe's."})
    failures: list[str] = field(
        default_factory=lambda: ["frozen", "jittering", "vanishing"],
        metadata={"help": "How bad clips fail; two more ways are harder to see in so short a training."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of clips, weights and prompts."})

    def __post_init__(self) -> None:
        check(1 <= self.num_prompts <= 24, "num_prompts", self.num_prompts, "in [1, 24]")


@dataclass(frozen=True)
class Stage:
    """Commands that make `outputs`, files or folders below the demo's folder."""

    name: str
    title: str
    commands: list[list[str]]
    outputs: list[str]

    def digest(self) -> str:
        """Changes with the commands and the recipes they read."""
        recipes = [Path(word) for command in self.commands for word in command if word.endswith(".yaml")]
        text = json.dumps(self.commands) + "".join(path.read_text(encoding="utf-8") for path in recipes)
        return hashlib.sha256(text.encode()).hexdigest()


def plan(config: DemoConfig) -> list[Stage]:
    """All stages, in order."""
    root = Path(config.output_dir)
    pipeline, reward, prfl = str(root / "pipeline"), str(root / "reward"), str(root / "prfl")
    base = ["--pretrained_model_name_or_path", pipeline]
    best = ["--reward_model", f"{reward}/best"]
    manifests = {split: str(root / "clips" / split / "manifest.json") for split in ("train", "held_out")}
    latents = {split: str(root / "latents" / split) for split in manifests}
    num_clips = {"train": config.num_clips, "held_out": config.num_held_out_clips}
    videos = {"base": [], "prfl": ["--lora_path", prfl]}
    sources = {
        "real": manifests["held_out"],
        **{name: str(root / "videos" / name / "manifest.json") for name in videos},
    }

    clips = [
        [*("--output_dir", str(root / "clips" / split)), "--num_clips", str(number), "--split", split]
        for split, number in num_clips.items()
    ]
    world = ["--failures", *config.failures, "--seed", str(config.seed)]
    pretrain = ["--output_dir", pipeline, *world, "--vae_steps", str(config.vae_steps)]
    pretrain += ["--generator_steps", str(config.generator_steps)]
    train_reward = ["--train_dataset", latents["train"], "--validation_dataset", latents["held_out"]]
    train_reward += ["--output_dir", reward, *steps_option(config.reward_steps)]
    train_prfl = ["--train_dataset", latents["train"], "--output_dir", prfl, *steps_option(config.prfl_steps)]
    return [
        Stage(
            "clips",
            "write mp4 clips with captions and labels",
            [python("clips", [*options, *world]) for options in clips],
            ["clips"],
        ),
        Stage(
            "pretrain", "train a tiny Wan pipeline on good and bad clips", [python("pretrain", pretrain)], ["pipeline"]
        ),
        Stage(
            "preprocess",
            "encode the clips",
            [
                launch("preprocess", [*base, "--manifest", manifests[split], "--output_dir", latents[split]])
                for split in manifests
            ],
            ["latents"],
        ),
        Stage("train_reward", "train the reward model", [launch("train_reward", [*base, *train_reward])], ["reward"]),
        Stage("train_prfl", "tune the generator on it", [launch("train_prfl", [*base, *best, *train_prfl])], ["prfl"]),
        Stage(
            "generate",
            "videos before and after, held-out captions, same seeds",
            [
                launch(
                    "generate",
                    [*base, *lora]
                    + ["--prompts", str(root / "prompts.json"), "--output_dir", str(root / "videos" / name)],
                )
                for name, lora in videos.items()
            ],
            ["videos"],
        ),
        Stage(
            "score",
            "score real clips and both kinds of videos",
            [
                launch(
                    "score",
                    [*base, *best, "--manifest", manifest, "--output", str(root / "scores" / f"{name}.csv")],
                )
                for name, manifest in sources.items()
            ],
            ["scores"],
        ),
    ]


def python(module: str, options: list[str]) -> list[str]:
    return [sys.executable, "-m", f"examples.shapes.{module}", *options]


def launch(verb: str, options: list[str]) -> list[str]:
    """What a user types to run one of the package's scripts; those that only share out clips get two processes."""
    accelerate_config = TWO_PROCESSES if verb in SHARED_OUT else ONE_PROCESS
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    return [*accelerate, "-m", f"hy_prfl.scripts.{verb}", "--config", str(RECIPES / f"{verb}.yaml"), *options]


def steps_option(steps: int | None) -> list[str]:
    return [] if steps is None else ["--max_train_steps", str(steps)]


def run_stages(stages: Sequence[Stage], root: Path, fresh: bool) -> dict[str, float]:
    """Run what is not complete, and all that comes after it; returns the seconds that each stage took."""
    (root / "stages").mkdir(parents=True, exist_ok=True)
    seconds = {}
    for number, stage in enumerate(stages, 1):
        record = root / "stages" / f"{stage.name}.json"
        done = None if fresh or not record.is_file() else json.loads(record.read_text(encoding="utf-8"))
        complete = done is not None and done["digest"] == stage.digest()
        print(f"\n[{number}/{len(stages)}] {stage.title}" + (": complete" if complete else ""), flush=True)
        if not complete:
            fresh = True
            record.unlink(missing_ok=True)
            for output in stage.outputs:
                shutil.rmtree(root / output, ignore_errors=True)
            start = time.monotonic()
            for command in stage.commands:
                run_command(command)
            done = {"digest": stage.digest(), "seconds": time.monotonic() - start}
            write_json(record, done)
        seconds[stage.name] = done["seconds"]
    return seconds


def run_command(command: list[str]) -> None:
    """Run one command with its output on the terminal; a failure ends the demo with its exit code."""
    shown = (
        " ".join(command)
        .replace(sys.executable, "python")
        .replace("python -m accelerate.commands.launch", "accelerate launch")
    )
    print(f"$ {shown}", flush=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    # Operations this small gain nothing from a second thread, and lose a lot if it has to share its core.
    environment.setdefault("OMP_NUM_THREADS", "1")
    if not sys.stderr.isatty():
        environment.setdefault("TQDM_MININTERVAL", "20")
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        sys.exit(f"demo: this command failed with exit code {code}:\n  {shown}")


def write_prompts(path: Path, num_prompts: int) -> None:
    """Held-out captions with a seed each, as `generate` reads them."""
    captions = split_captions("held_out")[:num_prompts]
    rows = [{"id": f"{index:02d}", "caption": str(text), "seed": 1000 + index} for index, text in enumerate(captions)]
    write_json(path, rows)


def write_comparison(root: Path, num_rows: int = 8, every: int = 4) -> Path:
    """Picture with some frames of the first videos, before (left) and after PRFL (right)."""
    prompts = json.loads((root / "prompts.json").read_text(encoding="utf-8"))[:num_rows]
    rows = []
    for prompt in prompts:
        name = f"{prompt['id']}_seed_{prompt['seed']}.mp4"
        strips = [
            np.concatenate(
                list(read_video(root / "videos" / kind / name, fps=FPS, num_frames=NUM_FRAMES)[::every]), axis=1
            )
            for kind in ("base", "prfl")
        ]
        gap = np.full((strips[0].shape[0], 8, 3), 255, dtype=np.uint8)
        rows.append(np.concatenate([strips[0], gap, strips[1]], axis=1))
    picture = Image.fromarray(np.concatenate(rows))
    path = root / "before_after.png"
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)
    return path


def summarize(root: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Numbers of the finished demo, from the files that its stages wrote."""
    scores = {
        name: json.loads((root / "scores" / f"{name}.csv.summary.json").read_text(encoding="utf-8"))
        for name in ("real", "base", "prfl")
    }
    manifest = json.loads((root / "clips" / "held_out" / "manifest.json").read_text(encoding="utf-8"))
    num_good = sum(row["physics_quality"] == 1 and row["human_quality"] == 1 for row in manifest)
    files = {
        "clips": "clips/train/manifest.json",
        "pipeline": "pipeline",
        "dataset": "latents/train",
        "reward_model": "reward/best",
        "lora": "prfl/pytorch_lora_weights.safetensors",
        "videos_base": "videos/base",
        "videos_prfl": "videos/prfl",
        "scores": "scores",
        "before_after": "before_after.png",
    }
    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "reward_model": {
            "metrics": scores["real"]["metrics"],
            "majority_accuracy": max(num_good, len(manifest) - num_good) / len(manifest),
        },
        "rewards": {name: summary["rewards"] for name, summary in scores.items()},
        "files": {name: str(root / path) for name, path in files.items()},
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The table at the end of the demo."""
    print(f"\n{'stage':<14}{'seconds':>8}")
    for name, value in summary["seconds"].items():
        print(f"{name:<14}{value:>8.0f}")

    metrics, rewards = summary["reward_model"]["metrics"], summary["rewards"]
    timesteps = [name.split("/t")[1] for name in metrics if name.startswith("accuracy/t")]
    print(f"\n{'timestep':<34}" + "".join(f"{name:>8}" for name in [*timesteps, "mean"]))
    for kind in ("accuracy", "auc"):
        values = [metrics[f"{kind}/t{timestep}"] for timestep in timesteps]
        print(
            f"{f'reward model, held out: {kind}':<34}"
            + "".join(f"{value:>8.2f}" for value in [*values, metrics[kind]])
        )
    titles = {"real": "mean reward: real, held out", "base": "mean reward: base", "prfl": "mean reward: after PRFL"}
    for name, title in titles.items():
        values = [rewards[name][f"reward_t{timestep}"] for timestep in timesteps]
        print(f"{title:<34}" + "".join(f"{value:>8.2f}" for value in [*values, rewards[name]["reward"]]))
    print(f"Always guessing the commoner label is right for {summary['reward_model']['majority_accuracy']:.2f}.")
    print(
        "The rewards are the reward model's own view of the videos: that they rise does not prove the videos better."
    )

    print()
    for name, path in summary["files"].items():
        print(f"{name:<14}{path}")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(DemoConfig, argv, description=__doc__)
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    write_prompts(root / "prompts.json", config.num_prompts)
    seconds = run_stages(plan(config), root, config.fresh)
    write_comparison(root)
    summary = summarize(root, seconds)
    write_json(root / "summary.json", summary)
    print_summary(summary)
    print(f"{'summary':<14}{root / 'summary.json'}")


if __name__ == "__main__":
    main()
