"""
What does an update have to cost, and how hard should the reward pull?

    python -m examples.shapes.experiments.rollouts --demo outputs/demo

Starts from a demo with more labelled clips (`make demo DEMO_ARGS="--num_labelled_clips 2048"`), and trains a reward model for
each seed on them. Every arm tunes the pretrained generator with the demo's recipe, and differs in how often it rolls out, in
how many steps the gradient passes through, in what the reward is taken of, or in how hard it pulls. Then the judge looks at
144 new videos of held-out captions. Flow-matching updates take the pretraining's mixture of clips, those of `curated` arms
good clips only. Writes `results/rollouts.json` and a plot of it.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.shapes.clips import split_captions
from examples.shapes.experiments.inputs import preprocess_commands
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, run_all, with_other_arms
from examples.shapes.experiments.sampling import BATCH_SIZE, NUM_STEPS, load_generator, walk_chains
from examples.shapes.judge import KINDS, write_json
from examples.shapes.pretrain import clips_options
from examples.shapes.stages import RECIPES, Stage, launch, python
from examples.shapes.summary import read_json
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.planning.estimate import forwards_without_gradient


NUM_VIDEOS = 144
# Those whose reward models are an ensemble.
SEEDS = (0, 1, 2)
# In forwards of the generator: one, its backward pass of twice the FLOPs, and one of activation checkpointing.
STEP_WITH_GRADIENT = 4
# Each reward update rolls out for itself; the recipe reuses.
FRESH = ["--rollout_interval", "1", "--rollout_buffer_size", "1"]
REUSED = ["--rollout_interval", "8", "--rollout_buffer_size", "8"]
FORESEEN = ["--reward_at", "foreseen"]
DISAGREEMENT = ["--reward_disagreement", "0.5"]
ANCHORED = ["--anchor_scale", "1"]
# The default, which the recipe for all weights turns off.
DIVIDED = ["--divide_by_step_width", "true"]
# Options without effect on the cost.
UNUSED = [
    *(
        "--pretrained_model_name_or_path",
        "-",
        "--reward_models",
        "a",
        "b",
        "--train_dataset",
        "-",
        "--output_dir",
        "-",
    ),
    *("--lora_rank", "16", "--num_inference_steps", str(NUM_STEPS)),
]
# Weight of the reward in most arms, and in those that pull harder.
SCALE, HARD = 0.3, 1.0


@dataclass(kw_only=True)
class RolloutsConfig(ExperimentConfig):
    """What to run."""

    demo: str = field(default="outputs/demo", metadata={"help": "Folder of a demo."})
    output_dir: str = field(default="outputs/experiments/rollouts", metadata={"help": "Folder for models and logs."})


@dataclass(frozen=True)
class Arm:
    """
    One way to tune the generator.

    Args:
        options (`list[str]`):
            Options of `train_prfl` besides those of the demo's recipe.
        num_steps (`int`):
            Steps of a flow-matching and a reward update.
        clips (`str`):
            Clips of the flow-matching updates, "train", the pretraining's mixture, or "good".
        scale (`float`):
            Weight of the reward.
        ensemble (`bool`):
            Whether it is tuned on the reward models of all seeds at once, instead of that of its seed.
        full (`bool`):
            Whether all weights train, with the recipe of the experiments, instead of a LoRA with that of the demo.
    """

    options: list[str] = field(default_factory=lambda: FRESH)
    num_steps: int = 80
    clips: str = "train"
    scale: float = SCALE
    ensemble: bool = False
    full: bool = False

    def forwards(self) -> float:
        """Cost of a step, a flow-matching and a reward update, in forwards of the generator for a clip."""
        config = parse_config(PRFLTrainingConfig, [*UNUSED, *self.options])
        first, last = config.step_range or (config.num_chained_steps - 1, config.num_inference_steps - 2)
        with_gradient = STEP_WITH_GRADIENT * (1 + config.num_chained_steps)
        # The anchor needs the velocity of the base.
        without = forwards_without_gradient(config, first, last) + (config.anchor_scale > 0)
        return with_gradient + without


ARMS = {
    "prfl": Arm(),
    "reused": Arm(REUSED),
    "interval_16": Arm(["--rollout_interval", "16", "--rollout_buffer_size", "4"]),
    # A fifth of the states of each chain, so that checkpoints have less to write.
    "reused_few_states": Arm([*REUSED, "--rollout_states", "4"]),
    # Rollouts of half as many steps as a video is sampled with.
    "reused_short": Arm([*REUSED, "--num_inference_steps", "10"]),
    "cached": Arm([*FRESH, "--rollout_cache_interval", "2"]),
    "reused_cached": Arm([*REUSED, "--rollout_states", "4", "--rollout_cache_interval", "2"]),
    "reused_early": Arm([*REUSED, "--step_range", "0", "5"]),
    "foreseen": Arm([*FRESH, *FORESEEN]),
    "reused_foreseen": Arm([*REUSED, *FORESEEN]),
    "chained_4": Arm([*FRESH, "--num_chained_steps", "4"]),
    "reused_int8": Arm([*REUSED, "--base_quantization", "int8"]),
    "prfl_160": Arm(num_steps=160),
    "reused_160": Arm(REUSED, num_steps=160),
    "reused_hard_160": Arm(REUSED, num_steps=160, scale=HARD),
    "anchored_hard_160": Arm([*REUSED, *ANCHORED], num_steps=160, scale=HARD),
    "reused_foreseen_160": Arm([*REUSED, *FORESEEN], num_steps=160),
    "ensemble_160": Arm([*REUSED, *DISAGREEMENT], num_steps=160, ensemble=True),
    "ensemble_hard_160": Arm([*REUSED, *DISAGREEMENT], num_steps=160, scale=HARD, ensemble=True),
    "full_prfl": Arm([*FRESH, *DIVIDED], full=True),
    "full_reused": Arm([*REUSED, *DIVIDED], full=True),
    "full_reused_short": Arm([*REUSED, *DIVIDED, "--num_inference_steps", "10"], full=True),
    "curated_prfl": Arm(clips="good"),
    "curated_reused": Arm(REUSED, clips="good"),
    "curated_reused_160": Arm(REUSED, clips="good", num_steps=160),
}


def reward_model_dir(root: Path, seed: int) -> Path:
    return root / "reward_models" / str(seed)


def arm_dir(root: Path, name: str, seed: int) -> Path:
    return root / "generators" / f"{name}_{seed}"


def input_stages(root: Path, demo: Path, seeds: Sequence[int]) -> list[Stage]:
    """Clips for flow matching, of the pretraining's mixture and good ones, and a reward model for each seed."""
    options = {"train": [*clips_options(), "--seed", "1"], "good": ["--good_share", "1", "--seed", "12"]}
    folders = {name: root / "clips" / name for name in options}
    commands = [
        python("clips", ["--output_dir", str(folders[name]), "--num_clips", "256", *each])
        for name, each in options.items()
    ]
    manifests = {name: folder / "manifest.json" for name, folder in folders.items()}
    commands += preprocess_commands(root, manifests, two_processes=False)
    return [
        Stage("clips", "clips", commands, ["clips", "latents"]),
        *[Stage(f"reward_{seed}", f"reward_{seed}", [reward_command(root, demo, seed)], []) for seed in seeds],
    ]


def reward_command(root: Path, demo: Path, seed: int) -> list[str]:
    options = [
        *("--train_dataset", str(demo / "latents" / "labelled"), "--seed", str(seed)),
        *("--validation_dataset", str(demo / "latents" / "held_out")),
        *("--output_dir", str(reward_model_dir(root, seed))),
    ]
    return launch("train_reward", options)


def tuning_stage(root: Path, name: str, arm: Arm, seed: int, reward_models: Sequence[Path] | None = None) -> Stage:
    """Tune the generator, on the reward model of its seed, or of all `SEEDS`, unless others are given."""
    if reward_models is None:
        reward_models = [reward_model_dir(root, each) / "best" for each in (SEEDS if arm.ensemble else [seed])]
    output_dir = arm_dir(root, name, seed)
    options = [
        *(
            "--train_dataset",
            str(root / "latents" / arm.clips),
            "--reward_models" if len(reward_models) > 1 else "--reward_model",
        ),
        *map(str, reward_models),
        *("--output_dir", str(output_dir), "--seed", str(seed), "--max_train_steps", str(arm.num_steps)),
        *("--checkpointing_steps", str(arm.num_steps), "--reward_scale", str(arm.scale), *arm.options),
    ]
    stage = f"generator_{name}_{seed}"
    command = launch("train_prfl", options, recipes=RECIPES / "experiments" if arm.full else RECIPES)
    return Stage(stage, stage, [command], [str(output_dir.relative_to(root))])


def verdicts_file(root: Path, name: str, seed: int) -> Path:
    return root / "verdicts" / f"{name}_{seed}.json"


@torch.no_grad()
def judge_arm(root: Path, name: str, seed: int) -> None:
    """Verdicts on new videos; the same captions and noise for all arms of a seed."""
    torch.set_num_threads(1)
    tuned, path = None if name == "base" else arm_dir(root, name, seed), verdicts_file(root, name, seed)
    captions = split_captions("held_out")
    pipeline = load_generator(tuned)
    kinds: list[str] = []
    for start in range(0, NUM_VIDEOS, BATCH_SIZE):
        numbers = range(start, min(NUM_VIDEOS, start + BATCH_SIZE))
        texts = [str(captions[number % len(captions)]) for number in numbers]
        found = walk_chains(pipeline, texts, [1000 * (seed + 1) + number for number in numbers])
        kinds += found["kind"].tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {kind: kinds.count(kind) / len(kinds) for kind in KINDS})


def summarize(root: Path, arms: Mapping[str, Arm], seeds: Sequence[int]) -> dict[str, Any]:
    """The judge's verdicts and the cost of each arm."""
    results: dict[str, Any] = {}
    for name in ("base", *arms):
        verdicts = [read_json(verdicts_file(root, name, seed)) for seed in seeds]
        results[name] = {kind: mean_and_spread([each[kind] for each in verdicts]) for kind in KINDS}
        if name in arms:
            arm = arms[name]
            results[name] |= {"num_steps": arm.num_steps, "forwards_per_step": round(arm.forwards(), 2)}
            results[name]["forwards"] = round(arm.num_steps * arm.forwards())
    return results


def plot(arms: Mapping[str, Any], path: Path) -> None:
    """Good videos and those beyond real ones, against the cost of a run."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    for axes, kind in zip(panels, ("good", "beyond"), strict=True):
        base = arms["base"][kind]["mean"]
        axes.axhline(base, color="gray", linestyle=":", label="before")
        for name, arm in arms.items():
            if name == "base":
                continue
            marker = "s" if name.startswith("curated") else "o"
            axes.errorbar(arm["forwards"], arm[kind]["mean"], yerr=arm[kind]["std"], marker=marker, capsize=2)
            axes.annotate(name.replace("_", " "), (arm["forwards"], arm[kind]["mean"]), fontsize=7, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set(xlabel="forwards of the generator for a clip, whole run", xscale="log", title=f"{kind}, by the judge")
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(RolloutsConfig, argv, description=__doc__)
    root, demo, seeds = Path(config.output_dir), Path(config.demo), config.seeds
    arms = {name: ARMS[name] for name in config.choose(list(ARMS))}
    run_all(input_stages(root, demo, seeds), root, config.num_parallel)
    # Seed by seed, so that what is there when a run is stopped can be compared.
    tuning = [tuning_stage(root, name, arm, seed) for seed in seeds for name, arm in arms.items()]
    run_all(tuning, root, config.num_parallel)
    judged = [(name, seed) for name in ("base", *arms) for seed in seeds]
    left = [pair for pair in judged if not verdicts_file(root, *pair).is_file()]
    with ProcessPoolExecutor(config.num_parallel, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(judge_arm, root), *zip(*left, strict=True) if left else ((), ())))
    results = {"seeds": seeds, "num_videos": NUM_VIDEOS, "arms": summarize(root, arms, seeds)}
    results_dir = Path(config.results_dir)
    results["arms"] = with_other_arms(results_dir / "rollouts.json", results, list(ARMS))
    write_json(results_dir / "rollouts.json", results)
    plot(results["arms"], results_dir / "rollouts.png")
    print(f"{results_dir / 'rollouts.json'}: {len(arms)} arms of {len(results['arms']) - 1}")


if __name__ == "__main__":
    main()
