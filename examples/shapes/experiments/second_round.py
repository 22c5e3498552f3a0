"""
Why is it not more, and what would help? The reward model learns again, from what it has led the generator to.

    python -m examples.shapes.experiments.second_round

New videos of the tuned generator get the judge's labels. First: does the reward model still tell good from bad among
them? Then a reward model is trained on these videos and all that the first one had, and the pretrained generator is tuned
again from the start, for as many steps on either model. Writes `results/second_round.json` and a plot of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.shapes.annotate import AnnotateConfig
from examples.shapes.demo import write_prompts
from examples.shapes.experiments.generators import ARMS as GENERATORS
from examples.shapes.experiments.generators import Arm, arm_dir, summarize, tuning_stage
from examples.shapes.experiments.inputs import (
    NUM_LABELLED,
    NUM_SAMPLES,
    labelled_manifests,
    make_inputs,
    merge_manifests,
    preprocess_commands,
)
from examples.shapes.experiments.reward_models import (
    TIMESTEPS,
    UPDATES,
    reward_model_dir,
    training_command,
    training_stage,
)
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, plot_spread, run_all
from examples.shapes.judge import write_json
from examples.shapes.stages import Stage, launch, python
from examples.shapes.summary import read_json
from hy_prfl.configs.parser import parse_config


FIRST, SECOND = "own_and_real", "second_round"
# What is tuned on the first reward model, and makes the videos that the second one learns from.
TUNED = "divided_by_step_width"
NUM_TUNED_SAMPLES = 1024
# Each video as often as in the first round. Of a generator's videos a share is kept for validation.
TRAIN_SHARE = 1 - AnnotateConfig.validation_share
NUM_FIRST = NUM_LABELLED + TRAIN_SHARE * NUM_SAMPLES
NUM_UPDATES = round(UPDATES[FIRST] * (NUM_FIRST + TRAIN_SHARE * NUM_TUNED_SAMPLES) / NUM_FIRST)
ARMS = {
    "one_round": Arm(GENERATORS[TUNED].options, times=2),
    "two_rounds": Arm(GENERATORS[TUNED].options, times=2, reward_model=SECOND),
}


def round_dir(root: Path, seed: int) -> Path:
    return root / SECOND / str(seed)


def samples_stage(root: Path, seed: int) -> Stage:
    """Videos of the tuned generator, with the judge's labels."""
    name, folder = f"{SECOND}_samples_{seed}", round_dir(root, seed)
    samples = ["--prompts", str(root / SECOND / "prompts.json"), "--output_dir", str(folder / "samples")]
    samples += ["--transformer_path", str(arm_dir(root, TUNED, seed) / "transformer")]
    labels = ["--manifest", str(folder / "samples" / "manifest.json"), "--output_dir", str(folder / "labels")]
    commands = [launch("generate", samples), python("annotate", labels)]
    return Stage(name, name, commands, [str(folder.relative_to(root))])


def reward_stage(root: Path, seed: int) -> Stage:
    """Encode these and all that the first reward model had, and train on them as it was trained."""
    name, output_dir = f"reward_{SECOND}_{seed}", reward_model_dir(root, SECOND, seed)
    latents = f"{SECOND}_{seed}"
    commands = preprocess_commands(root, {latents: round_dir(root, seed) / "all.json"}, two_processes=False)
    commands.append(training_command(root, output_dir, seed, latents=latents, num_updates=NUM_UPDATES))
    return Stage(name, name, commands, [str(output_dir.relative_to(root)), f"latents/{latents}"])


def scoring_stage(root: Path, reward_model: str, seed: int) -> Stage:
    """Score those of the tuned generator's videos that no reward model has been trained on."""
    name, folder = f"{SECOND}_scores_{reward_model}_{seed}", round_dir(root, seed)
    options = [
        *("--reward_model", str(reward_model_dir(root, reward_model, seed) / "best")),
        *("--manifest", str(folder / "labels" / "validation.json")),
        *("--output", str(scores_file(root, reward_model, seed)), "--timesteps", *map(str, TIMESTEPS)),
    ]
    return Stage(name, name, [launch("score", options)], [])


def scores_file(root: Path, reward_model: str, seed: int) -> Path:
    return root / SECOND / f"scores_{reward_model}_{seed}.csv"


def summarize_rewards(root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """AUC at each noise level: of both models on videos of the pretrained generator, and on those of the tuned one."""
    found = {}
    for model in (FIRST, SECOND):
        before = [read_json(reward_model_dir(root, model, seed) / "best" / "metrics.json") for seed in seeds]
        after = [read_json(Path(f"{scores_file(root, model, seed)}.summary.json"))["metrics"] for seed in seeds]
        for videos, metrics in (("pretrained", before), ("tuned", after)):
            found[f"{model}/{videos}"] = [
                {"timestep": timestep, "auc": mean_and_spread([each[f"auc/t{timestep}"] for each in metrics])}
                for timestep in TIMESTEPS
            ]
    return found


def plot(results: Mapping[str, Any], path: Path) -> None:
    """AUC against the timestep, and the judge against the reward on the way."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    aucs, curves = figure.subplots(1, 2)
    for name, points in results["rewards"].items():
        model, videos = name.split("/")
        label = f"{'first' if model == FIRST else 'second'} reward model, videos of the {videos} generator"
        plot_spread(aucs, [point["timestep"] for point in points], [point["auc"] for point in points], label=label)
    aucs.set(title="Good against bad videos", xlabel="timestep", ylabel="AUC", ylim=(0.45, 1.02))
    aucs.legend(fontsize=7, frameon=False)
    for name, arm in results["arms"].items():
        points = arm["on_the_way"]
        shares = [point["share_of_run"]["mean"] for point in points]
        plot_spread(curves, shares, [point["good"] for point in points], label=f"{name.replace('_', ' ')}: judge")
        color = curves.lines[-1].get_color()
        curves.plot(shares, [point["reward"]["mean"] for point in points], linestyle=":", color=color)
    curves.set(title="Judge (lines), reward (dots)", xlabel="share of the run", ylim=(0, 1.02))
    curves.legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    root, results_dir, seeds = Path(config.output_dir), Path(config.results_dir), config.seeds
    arms = {name: ARMS[name] for name in config.choose(list(ARMS))}
    make_inputs(root, seeds)
    run_all([training_stage(root, FIRST, seed) for seed in seeds], root, config.num_parallel)
    run_all([tuning_stage(root, TUNED, GENERATORS[TUNED], seed) for seed in seeds], root, config.num_parallel)
    write_prompts(root / SECOND / "prompts.json", "train", NUM_TUNED_SAMPLES, first_seed=200_000, prefix="tuned_")
    run_all([samples_stage(root, seed) for seed in seeds], root, config.num_parallel)
    for seed in seeds:
        labelled = [*labelled_manifests(root), round_dir(root, seed) / "labels" / "train.json"]
        merge_manifests(labelled, round_dir(root, seed) / "all.json")
    run_all([reward_stage(root, seed) for seed in seeds], root, config.num_parallel)
    scoring = [scoring_stage(root, model, seed) for seed in seeds for model in (FIRST, SECOND)]
    tuning = [tuning_stage(root, name, arm, seed) for seed in seeds for name, arm in arms.items()]
    run_all([*scoring, *tuning], root, config.num_parallel)
    results = {"seeds": seeds, "rewards": summarize_rewards(root, seeds), "arms": summarize(root, arms, seeds)}
    write_json(results_dir / "second_round.json", results)
    plot(results, results_dir / "second_round.png")
    print(f"{results_dir / 'second_round.json'}: {len(arms)} arms")


if __name__ == "__main__":
    main()
