"""
Claims about the generator: does climbing the latent reward make better videos, and when does it end?

    python -m examples.shapes.experiments.generators

Every arm tunes the pretrained generator from the same start for as many steps, two updates each, on a reward model of
`reward_models.py` with the same seed; then the judge looks at new videos of captions that nobody has trained on. The
reward model never sees the judge, nor the judge the reward model. `uncurated` arms take their flow-matching updates on
the mixture that the generator was pretrained on, `curated` ones on good clips only. Writes `results/generators.json`
and a plot of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.shapes.experiments.inputs import make_inputs
from examples.shapes.experiments.reward_models import reward_model_dir, training_stage
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, run_all
from examples.shapes.judge import write_json
from examples.shapes.report import read_metrics
from examples.shapes.stages import RECIPES, Stage, launch, python
from examples.shapes.summary import judge_validations, read_json
from hy_prfl.configs.parser import parse_config


# Steps of an update of each kind, or as many single updates; validation after each quarter.
NUM_STEPS = 80
NUM_VALIDATIONS = 4


@dataclass(frozen=True)
class Arm:
    """
    One way to tune the generator.

    Args:
        options (`list[str]`):
            Options of `train_prfl` besides those of the recipe.
        clips (`str`):
            Clips of the flow-matching updates, "mixture" or "good".
        reward_model (`str`):
            Arm of `reward_models.py`.
        trains (`bool`):
            Whether it is tuned at all.
        single (`bool`):
            Whether a step has one update only, of both losses or of one of them.
        times (`int`):
            How many times longer than the others it runs.
    """

    options: list[str] = field(default_factory=list)
    clips: str = "mixture"
    reward_model: str = "own_and_real"
    trains: bool = True
    single: bool = False
    times: int = 1


def schedule(name: str) -> list[str]:
    return ["--update_schedule", name]


# A chain has 20 steps; any of the first 19 may take the gradient.
ARMS = {
    "base": Arm(trains=False),
    "flow_matching": Arm(schedule("flow_matching"), single=True),
    "prfl": Arm(),
    "curated_flow_matching": Arm(schedule("flow_matching"), clips="good", single=True),
    "curated_prfl": Arm(clips="good"),
    # A step of PRFL takes as long as four updates of flow matching, here.
    "curated_flow_matching_twice": Arm(schedule("flow_matching"), clips="good", single=True, times=2),
    "deep_reward": Arm(reward_model="blocks_6"),
    "own_videos_reward": Arm(reward_model="finetuned"),
    "real_clips_reward": Arm(reward_model="real_clips"),
    "logit": Arm(["--reward_loss", "logit"]),
    "sigmoid": Arm(["--reward_loss", "sigmoid"]),
    "scale_1": Arm(["--reward_scale", "1"]),
    "joint": Arm(schedule("joint"), single=True),
    "reward_only": Arm(schedule("reward"), single=True),
    "early": Arm(["--step_range", "0", "5"]),
    "curated_early": Arm(["--step_range", "0", "5"], clips="good"),
    "middle": Arm(["--step_range", "6", "12"]),
    "late": Arm(["--step_range", "13", "18"]),
    "divided_by_step_width": Arm(["--divide_by_step_width", "true"]),
    "curated_divided_by_step_width": Arm(["--divide_by_step_width", "true"], clips="good"),
    "gradient_steps_4": Arm(["--num_gradient_steps", "4"]),
}
PANELS = {
    "Uncurated": ["flow_matching", "prfl", "divided_by_step_width"],
    "Curated": [
        "curated_flow_matching",
        "curated_flow_matching_twice",
        "curated_prfl",
        "curated_divided_by_step_width",
        "curated_early",
    ],
    "Reward model": ["prfl", "deep_reward", "own_videos_reward", "real_clips_reward"],
    "Loss and schedule": ["prfl", "logit", "sigmoid", "scale_1", "joint", "reward_only"],
    "Steps with gradient": ["prfl", "early", "middle", "late", "gradient_steps_4"],
}


def arm_dir(root: Path, arm: str, seed: int) -> Path:
    return root / "generators" / f"{arm}_{seed}"


def tuning_stage(root: Path, name: str, arm: Arm, seed: int) -> Stage:
    """Tune the generator, sampling on the way, then make new videos and judge them."""
    output_dir = arm_dir(root, name, seed)
    num_steps = arm.times * (2 * NUM_STEPS if arm.single else NUM_STEPS)
    tune = [
        *("--train_dataset", str(root / "latents" / arm.clips)),
        *("--validation_dataset", str(root / "latents" / "held_out")),
        *("--reward_model", str(reward_model_dir(root, arm.reward_model, seed) / "best")),
        *("--output_dir", str(output_dir), "--max_train_steps", str(num_steps), "--seed", str(seed)),
        *("--validation_steps", str(num_steps // NUM_VALIDATIONS), "--checkpointing_steps", str(num_steps)),
        *("--validation_seed", str(seed), *arm.options),
    ]
    commands = judging_commands(root, output_dir, seed, tuned=arm.trains)
    if arm.trains:
        commands.insert(0, launch("train_prfl", tune, recipes=RECIPES / "experiments"))
    stage = f"generator_{name}_{seed}"
    return Stage(stage, stage, commands, [str(output_dir.relative_to(root))])


def judging_commands(root: Path, output_dir: Path, seed: int, *, tuned: bool) -> list[list[str]]:
    """Make new videos with what is in `output_dir`, or with the generator as it ships, and judge them."""
    generate = ["--prompts", str(root / f"prompts_{seed}.json"), "--output_dir", str(output_dir / "videos")]
    generate += ["--transformer_path", str(output_dir / "transformer")] if tuned else []
    judge = ["--manifest", str(output_dir / "videos" / "manifest.json"), "--output", str(output_dir / "verdicts.json")]
    return [launch("generate", generate), python("judge", judge)]


def on_the_way(root: Path, output_dir: Path) -> list[dict[str, float]]:
    """Share of the run that is done, the judge's and the reward model's view of each validation's samples."""
    judged = judge_validations(output_dir, root / "clips" / "held_out" / "manifest.json")
    lines = read_metrics(output_dir / "metrics.jsonl")
    rewards = {line["step"]: line["validation/reward"] for line in lines if "validation/reward" in line}
    return [
        {"share_of_run": step / max(rewards), "good": judged[int(step)], "reward": reward}
        for step, reward in rewards.items()
    ]


def summarize(root: Path, arms: Mapping[str, Arm], seeds: Sequence[int]) -> dict[str, Any]:
    """The judge's verdict on each arm, and its curves; mean and spread over the seeds."""
    results: dict[str, Any] = {}
    for name, arm in arms.items():
        results[name] = summarize_judging([arm_dir(root, name, seed) for seed in seeds])
        if arm.trains:
            curves = [on_the_way(root, arm_dir(root, name, seed)) for seed in seeds]
            results[name]["on_the_way"] = [
                {column: mean_and_spread([point[column] for point in points]) for column in points[0]}
                for points in zip(*curves, strict=True)
            ]
            stages = [tuning_stage(root, name, arm, seed) for seed in seeds]
            results[name]["seconds"] = mean_and_spread([stage.seconds(root) for stage in stages])
    return results


def summarize_judging(output_dirs: Sequence[Path]) -> dict[str, Any]:
    """Mean and spread of what the judge says about runs of several seeds."""
    found = [read_json(output_dir / "verdicts.json")["summary"] for output_dir in output_dirs]
    names = ("good", "right_shape", "right_color")
    results: dict[str, Any] = {name: mean_and_spread([summary[name] for summary in found]) for name in names}
    results["failures"] = {
        kind: mean_and_spread([summary["failures"][kind] / summary["num_videos"] for summary in found])
        for kind in found[0]["failures"]
    }
    return results


def plot(arms: Mapping[str, Any], path: Path) -> None:
    """Good videos at the end, and the judge against the reward on the way."""
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    bars, *others = figure.subplots(2, 3).flat
    names = list(arms)
    bars.barh(
        [name.replace("_", " ") for name in names],
        [arms[name]["good"]["mean"] for name in names],
        xerr=[arms[name]["good"]["std"] for name in names],
        color="#e0762f", ecolor="gray",
    )  # fmt: skip
    bars.invert_yaxis()
    bars.set(title="Good videos at the end, by the judge", xlim=(0, 1))
    for axes, (title, panel) in zip(others, PANELS.items(), strict=True):
        for name in [name for name in panel if name in arms]:
            points = arms[name]["on_the_way"]
            (line,) = axes.plot(
                [point["share_of_run"]["mean"] for point in points],
                [point["good"]["mean"] for point in points],
                marker="o", markersize=3, label=name.replace("_", " "),
            )  # fmt: skip
            axes.plot(
                [point["share_of_run"]["mean"] for point in points],
                [point["reward"]["mean"] for point in points],
                linestyle=":", color=line.get_color(),
            )  # fmt: skip
        axes.set(title=f"{title}: judge (lines), reward (dots)", xlabel="share of the run", ylim=(0, 1.02))
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    root, results_dir = Path(config.output_dir), Path(config.results_dir)
    arms = {name: ARMS[name] for name in config.choose(list(ARMS))}
    make_inputs(root, config.seeds)
    rewards = sorted({arm.reward_model for arm in arms.values()})
    run_all([training_stage(root, arm, seed) for seed in config.seeds for arm in rewards], root, config.num_parallel)
    # Seed by seed, so that what is there when a run is stopped can be compared.
    tuning = [tuning_stage(root, name, arm, seed) for seed in config.seeds for name, arm in arms.items()]
    run_all(tuning, root, config.num_parallel)
    results = {"seeds": config.seeds, "num_steps": NUM_STEPS, "arms": summarize(root, arms, config.seeds)}
    write_json(results_dir / "generators.json", results)
    plot(results["arms"], results_dir / "generators.png")
    print(f"{results_dir / 'generators.json'}: {len(arms)} arms")


if __name__ == "__main__":
    main()
