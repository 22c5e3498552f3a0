"""
Claim: a latent reward costs less than one of decoded frames, and does more for its cost.

    python -m examples.shapes.experiments.pixel_rewards

The same network judges latents (PRFL), or the first or all of the frames that the VAE makes of them (RGB ReFL), see
`frames_reward.py`. First it measures time and memory of an update with each, at three clip lengths; then each tunes the
generator for as long as `generators.py` gives PRFL, measured in seconds, and the judge looks at new videos. Writes
`results/pixel_rewards.json` and a plot of it.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan
from matplotlib.figure import Figure

from examples.benchmark.benchmark import in_process_of_its_own
from examples.benchmark.measuring import Measured, measure
from examples.benchmark.rgb_refl import RGBReFLTrainer
from examples.shapes.experiments.frames_refl import FramesReFLConfig, build_trainer
from examples.shapes.experiments.generators import (
    ARMS as GENERATORS,
)
from examples.shapes.experiments.generators import (
    NUM_STEPS,
    arm_dir,
    judging_commands,
    summarize_judging,
    tuning_stage,
)
from examples.shapes.experiments.inputs import make_inputs
from examples.shapes.experiments.reward_models import UPDATES, reward_model_dir, training_stage
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, run_all
from examples.shapes.judge import write_json
from examples.shapes.stages import RECIPES, Stage, python
from examples.shapes.summary import read_json
from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


# What the reward is fed with, and what RGB ReFL decodes for that.
ARMS = {"latents": None, "first_frame": "first", "all_frames": "all"}
LATENT_FRAMES = (5, 9, 17)
# The paper's late steps for RGB ReFL, 27 to 40 of 40; of 20, counted from 0. The last one takes no gradient.
LATE_STEPS = (13, 18)
# Where an update is measured: the mean of the steps that may take the gradient.
MEAN_STEP = {"latents": 9, "first_frame": 15, "all_frames": 15}


def frames_reward_dir(root: Path, arm: str, seed: int) -> Path:
    return root / "frames_rewards" / f"{arm}_{seed}"


def frames_reward_stage(root: Path, arm: str, seed: int) -> Stage:
    """Train the reward of frames on what the latent one is trained on."""
    name, output_dir = f"frames_reward_{arm}_{seed}", frames_reward_dir(root, arm, seed)
    options = [
        *("--train_dataset", str(root / "latents" / "own_and_real")),
        *("--validation_dataset", str(root / "latents" / "samples_validation")),
        *("--output_dir", str(output_dir), "--decodes", str(ARMS[arm])),
        *("--max_train_steps", str(UPDATES["own_and_real"]), "--seed", str(seed)),
    ]
    return Stage(name, name, [python("experiments.frames_reward", options)], [str(output_dir.relative_to(root))])


def tuning_options(root: Path, arm: str, seed: int, *, train_dataset: Path, output_dir: Path) -> list[str]:
    """Options of `train_prfl`, or of `frames_refl` for an arm that decodes, but for how long."""
    options = [
        *("--config", str(RECIPES / "experiments" / "train_prfl.yaml"), "--train_dataset", str(train_dataset)),
        *("--reward_model", str(reward_model_dir(root, "own_and_real", seed) / "best")),
        *("--output_dir", str(output_dir), "--seed", str(seed)),
    ]
    decodes = ARMS[arm]
    if decodes is not None:
        options += ["--frames_reward", str(frames_reward_dir(root, arm, seed)), "--decodes", decodes]
    return options


def refl_stage(root: Path, arm: str, seed: int, num_steps: int) -> Stage:
    """Tune the generator by RGB ReFL, then make new videos and judge them."""
    name, output_dir = f"refl_{arm}_{seed}", root / "refl" / f"{arm}_{seed}"
    tune = tuning_options(root, arm, seed, train_dataset=root / "latents" / "mixture", output_dir=output_dir)
    tune += ["--step_range", *map(str, LATE_STEPS)]
    tune += ["--max_train_steps", str(num_steps), "--checkpointing_steps", str(num_steps)]
    commands = [python("experiments.frames_refl", tune), *judging_commands(root, output_dir, seed, tuned=True)]
    return Stage(name, name, commands, [str(output_dir.relative_to(root))])


def measure_costs(root: Path) -> list[dict[str, Any]]:
    """Seconds and bytes of an update of each arm at each clip length, one process each; measured once."""
    path = root / "costs.json"
    if not path.is_file():
        costs = []
        for num_latent_frames in LATENT_FRAMES:
            write_noise(root, num_latent_frames)
            for arm in ARMS:
                found = root / "costs" / f"{arm}_{num_latent_frames}.json"
                in_process_of_its_own(root / "logs" / f"{found.stem}.txt", measure_cost, root, arm, num_latent_frames)
                costs.append(read_json(found))
        write_json(path, costs)
    return read_json(path)


def write_noise(root: Path, num_latent_frames: int) -> None:
    """Rows of random latents of so many frames."""
    vae = AutoencoderKLWan.from_pretrained("examples/shapes/pretrained", subfolder="vae")
    dataset = synthetic_dataset(
        latents_shape=(vae.config.z_dim, num_latent_frames, 6, 6),
        text_dim=64,
        vae_fingerprint=vae_fingerprint(vae),
        text_tokens=8,
        max_sequence_length=16,
        num_rows=16,
    )
    dataset.save_to_disk(root / "costs" / f"rows_{num_latent_frames}")


def measure_cost(root: Path, arm: str, num_latent_frames: int) -> None:
    """Measure the updates of an arm's trainer, a pair of both losses, and write what it took."""
    rows = root / "costs" / f"rows_{num_latent_frames}"
    output_dir = root / "costs" / f"{arm}_{num_latent_frames}"
    options = tuning_options(root, arm, 0, train_dataset=rows, output_dir=output_dir)
    options += ["--step_range", str(MEAN_STEP[arm]), str(MEAN_STEP[arm]), "--report_to", "none"]
    options += ["--max_train_steps", "1000", "--checkpointing_steps", "1000"]
    if ARMS[arm] is None:
        measured = type("Measured", (Measured, PRFLTrainer), {})
        trainer: PRFLTrainer = measured.from_config(parse_config(PRFLTrainingConfig, options))
    else:
        measured = type("Measured", (Measured, RGBReFLTrainer), {})
        trainer = build_trainer(parse_config(FramesReFLConfig, options), trainer=measured)
    found = measure(trainer, num_updates=3)
    cost = {
        "arm": arm,
        "num_frames": 4 * (num_latent_frames - 1) + 1,
        "seconds": statistics.median(found.seconds),
        "peak_bytes": found.peak_bytes,
        "flops": found.flops,
    }
    write_json(output_dir.with_suffix(".json"), cost)


def steps_at_equal_cost(costs: Sequence[Mapping[str, Any]], arm: str) -> int:
    """Steps that take as long as those of PRFL, on clips of this world's length."""
    seconds = {cost["arm"]: cost["seconds"] for cost in costs if cost["num_frames"] == 4 * (LATENT_FRAMES[0] - 1) + 1}
    return max(1, round(NUM_STEPS * seconds["latents"] / seconds[arm]))


def summarize(
    root: Path, costs: Sequence[Mapping[str, Any]], arms: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Costs as they are and against PRFL's, AUC of the rewards, and the judge's verdict at equal cost."""
    reference = {cost["num_frames"]: cost for cost in costs if cost["arm"] == "latents"}
    ratios = [
        {"arm": cost["arm"], "num_frames": cost["num_frames"]}
        | {
            name: round(cost[name] / reference[cost["num_frames"]][name], 3)
            for name in ("seconds", "peak_bytes", "flops")
        }
        for cost in costs
        if cost["arm"] != "latents"
    ]
    found: dict[str, Any] = {}
    for arm in arms:
        if arm == "latents":
            folders = [arm_dir(root, "prfl", seed) for seed in seeds]
        else:
            folders = [root / "refl" / f"{arm}_{seed}" for seed in seeds]
        found[arm] = {"num_steps": steps_at_equal_cost(costs, arm), **summarize_judging(folders)}
        if arm != "latents":
            metrics = [read_json(frames_reward_dir(root, arm, seed) / "metrics.json") for seed in seeds]
            found[arm]["auc"] = mean_and_spread([each["auc"] for each in metrics])
    return {"costs": costs, "ratios_to_latents": ratios, "arms": found}


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Time and memory against the length of the clips, and the judge's verdict."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    *measured, verdict = figure.subplots(1, 3)
    panels = zip(
        measured, ("seconds", "peak_bytes"), (1, 2**20), ("seconds an update", "peak memory, MiB"), strict=True
    )
    for axes, name, unit, title in panels:
        for arm in ARMS:
            points = [cost for cost in results["costs"] if cost["arm"] == arm]
            axes.plot(
                [point["num_frames"] for point in points],
                [point[name] / unit for point in points],
                marker="o", markersize=3, label=arm.replace("_", " "),
            )  # fmt: skip
        axes.set(title=title, xlabel="frames", ylim=(0, None))
        axes.legend(fontsize=8, frameon=False)
    good = {arm: values["good"] for arm, values in results["arms"].items()}
    verdict.barh(
        [arm.replace("_", " ") for arm in good],
        [values["mean"] for values in good.values()],
        xerr=[values["std"] for values in good.values()],
        color="#e0762f", ecolor="gray",
    )  # fmt: skip
    verdict.set(title="Good videos at equal cost, by the judge", xlim=(0, 1))
    verdict.invert_yaxis()
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    root, results_dir, seeds = Path(config.output_dir), Path(config.results_dir), config.seeds
    arms = config.choose(list(ARMS))
    decoding = [arm for arm in arms if arm != "latents"]
    make_inputs(root, seeds)
    rewards = [training_stage(root, "own_and_real", seed) for seed in seeds]
    rewards += [frames_reward_stage(root, arm, seed) for seed in seeds for arm in decoding]
    run_all(rewards, root, config.num_parallel)
    costs = measure_costs(root)
    tuning = [tuning_stage(root, "prfl", GENERATORS["prfl"], seed) for seed in seeds]
    tuning += [refl_stage(root, arm, seed, steps_at_equal_cost(costs, arm)) for seed in seeds for arm in decoding]
    run_all(tuning, root, config.num_parallel)
    results = {"seeds": seeds, **summarize(root, costs, arms, seeds)}
    write_json(results_dir / "pixel_rewards.json", results)
    plot(results, results_dir / "pixel_rewards.png")
    print(f"{results_dir / 'pixel_rewards.json'}: {len(arms)} arms")


if __name__ == "__main__":
    main()
