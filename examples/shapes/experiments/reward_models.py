"""
Claims about the reward model: does it see through noise, and what does it need for that?

    python -m examples.shapes.experiments.reward_models

Every arm trains for as many updates on videos of the generator with the judge's labels (`real_clips`: on real clips with
their exact ones, `own_and_real`: on both, twice as long), and is asked about other videos of the generator at five noise levels.
Writes `results/reward_models.json` and a plot of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.shapes.experiments.inputs import make_inputs
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, plot_spread, run_all
from examples.shapes.judge import write_json
from examples.shapes.stages import RECIPES, Stage, launch
from examples.shapes.summary import read_json
from hy_prfl.configs.parser import parse_config


NUM_UPDATES = 400
# One level in the middle of each fifth.
TIMESTEPS = [100, 300, 500, 700, 900]

# Options of `train_reward` besides those of the recipe: query attention with residual on 4 of 6 blocks, BCE.
ARMS: dict[str, list[str]] = {
    "finetuned": [],
    "probe": ["--freeze_blocks", "true"],
    # The sigmoid of a normal variable of hardly any spread: sigma .5 always.
    "one_sigma": ["--weighting_scheme", "logit_normal", "--logit_std", "1e-6", "--flow_shift", "1"],
    "real_clips": [],
    "own_and_real": [],
    "mean": ["--pooling", "mean"],
    "max": ["--pooling", "max"],
    "query_without_residual": ["--query_residual", "false"],
    "blocks_1": ["--num_layers", "1"],
    "blocks_2": ["--num_layers", "2"],
    "blocks_6": ["--num_layers", "6"],
    # As many clips in an update as the others.
    "bradley_terry": ["--loss", "bt", "--train_batch_size", "16"],
}
# What the arms train on that do not train on the generator's own videos alone.
DATASETS = {"real_clips": "labelled", "own_and_real": "own_and_real"}
# Twice the clips, each as often.
UPDATES = {"own_and_real": 2 * NUM_UPDATES}
PANELS = {
    "What is trained, and on what": ["finetuned", "probe", "one_sigma", "real_clips", "own_and_real"],
    "Pooling and loss": ["finetuned", "mean", "max", "query_without_residual", "bradley_terry"],
    "Blocks of 6": ["blocks_1", "blocks_2", "finetuned", "blocks_6"],
}


def reward_model_dir(root: Path, arm: str, seed: int) -> Path:
    return root / "reward_models" / f"{arm}_{seed}"


def training_stage(root: Path, arm: str, seed: int) -> Stage:
    """Train one reward model, and evaluate it at the end."""
    name, output_dir = f"reward_{arm}_{seed}", reward_model_dir(root, arm, seed)
    latents, num_updates = DATASETS.get(arm, "samples_train"), UPDATES.get(arm, NUM_UPDATES)
    command = training_command(root, output_dir, seed, latents=latents, num_updates=num_updates, options=ARMS[arm])
    return Stage(name, name, [command], [str(output_dir.relative_to(root))])


def training_command(
    root: Path, output_dir: Path, seed: int, *, latents: str, num_updates: int, options: Sequence[str] = ()
) -> list[str]:
    """Train on one of the datasets below `root/latents`, and evaluate at the end."""
    return launch(
        "train_reward",
        [
            *("--train_dataset", str(root / "latents" / latents)),
            *("--validation_dataset", str(root / "latents" / "samples_validation")),
            *("--output_dir", str(output_dir), "--validation_timesteps", *map(str, TIMESTEPS)),
            *("--max_train_steps", str(num_updates), "--validation_steps", str(num_updates)),
            *("--checkpointing_steps", str(num_updates), "--seed", str(seed), *options),
        ],
        recipes=RECIPES / "experiments",
    )


def summarize(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """AUC, and accuracy where there is one, of each arm by noise level; mean and spread over the seeds."""
    results: dict[str, Any] = {}
    for arm in arms:
        found = [read_json(reward_model_dir(root, arm, seed) / "best" / "metrics.json") for seed in seeds]
        results[arm] = {
            metric: {
                str(timestep): mean_and_spread([metrics[f"{metric}/t{timestep}"] for metrics in found])
                for timestep in TIMESTEPS
            }
            for metric in ("auc", "accuracy")
            if f"{metric}/t{TIMESTEPS[0]}" in found[0]
        }
        stages = [training_stage(root, arm, seed) for seed in seeds]
        results[arm]["seconds"] = mean_and_spread([stage.seconds(root) for stage in stages])
    return results


def majority_accuracy(root: Path) -> float:
    """Accuracy of always giving the commoner label, on the validation videos."""
    rows = read_json(root / "labels" / "validation.json")
    good = sum(row["physics_quality"] * row["human_quality"] for row in rows) / len(rows)
    return max(good, 1 - good)


def plot(arms: Mapping[str, Any], path: Path) -> None:
    """AUC against sigma, mean and spread."""
    panels = {title: [name for name in names if name in arms] for title, names in PANELS.items()}
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for name in names:
            auc = [arms[name]["auc"][str(timestep)] for timestep in TIMESTEPS]
            plot_spread(axes, [timestep / 1000 for timestep in TIMESTEPS], auc, label=name.replace("_", " "))
        axes.axhline(0.5, color="gray", linestyle=":")
        axes.set(title=title, xlabel="sigma (1 is pure noise)")
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("AUC on unseen videos")
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    root, results_dir = Path(config.output_dir), Path(config.results_dir)
    arms = config.choose(list(ARMS))
    make_inputs(root, config.seeds)
    # Seed by seed, so that what is there when a run is stopped can be compared.
    run_all([training_stage(root, arm, seed) for seed in config.seeds for arm in arms], root, config.num_parallel)
    results = {
        "seeds": config.seeds,
        "majority_accuracy": majority_accuracy(root),
        "arms": summarize(root, arms, config.seeds),
    }
    write_json(results_dir / "reward_models.json", results)
    plot(results["arms"], results_dir / "reward_models.png")
    print(f"{results_dir / 'reward_models.json'}: {len(arms)} arms")


if __name__ == "__main__":
    main()
