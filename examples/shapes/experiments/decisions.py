"""
When is it decided what a video becomes, and when does the reward model see it?

    python -m examples.shapes.experiments.decisions

Walks chains of the pretrained generator. At each step the reward model scores the noisy latents, and at some steps the
clean latents that the generator foresees are decoded and measured: does the shape move, does it stay? Both are held
against the judge's verdict on the finished video, as AUC of good videos against frozen and against vanishing ones. Where
a video is decided before the reward model can see it, a single step's gradient comes too late. Writes
`results/decisions.json` and a plot of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from examples.shapes.clips import split_captions
from examples.shapes.experiments.inputs import make_inputs
from examples.shapes.experiments.reward_models import reward_model_dir, training_stage
from examples.shapes.experiments.runs import ExperimentConfig, mean_and_spread, plot_spread, run_all
from examples.shapes.judge import judge_videos, write_json
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, PRETRAINED_DIR
from hy_prfl.configs.parser import parse_config
from hy_prfl.inference.generation import decode_latents
from hy_prfl.models.reward_model import WanRewardModel


NUM_STEPS, BATCH_SIZE = 20, 56
# Steps at which the foreseen video is looked at.
FORESEEN = (0, 1, 2, 3, 4, 6, 8, 11, 15)
# Failure -> measurement that tells it from good videos, more being better.
TOLD_BY = {"frozen": "speed", "vanishing": "presence"}
ARMS = ("own_and_real", "finetuned", "real_clips")


@torch.no_grad()
def follow_chains(
    pipeline: WanPipeline, reward_models: Mapping[str, WanRewardModel], captions: Sequence[str], seed: int
) -> list[dict[str, float]]:
    """For each step of the chains `{"timestep", "<arm>/<failure>", "foreseen/<failure>"}`, all AUC but the first."""
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    config = pipeline.vae.config
    prompt_embeds, _ = pipeline.encode_prompt(
        list(captions), do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    scheduler.set_timesteps(NUM_STEPS)
    shape = (len(captions), config.z_dim, 5, 6, 6)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    logits: list[dict[str, np.ndarray]] = []
    foreseen: dict[int, list[dict[str, float]]] = {}
    for index, timestep in enumerate(tqdm(scheduler.timesteps, desc=f"Chains of seed {seed}")):
        batches = list(zip(latents.split(BATCH_SIZE), prompt_embeds.split(BATCH_SIZE), strict=True))
        velocity = torch.cat([transformer(noisy, timestep.expand(len(noisy)), text).sample for noisy, text in batches])
        scores = {
            arm: torch.cat([model(noisy, timestep.expand(len(noisy)), text).logits for noisy, text in batches])
            for arm, model in reward_models.items()
        }
        logits.append({arm: values.numpy() for arm, values in scores.items()})
        if index in FORESEEN:
            clean = latents - scheduler.sigmas[index] * velocity
            verdicts = judge_videos(decode_latents(pipeline.vae, clean), captions)
            foreseen[index] = [verdict.measurements for verdict in verdicts]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    kinds = np.array([verdict.kind for verdict in judge_videos(decode_latents(pipeline.vae, latents), captions)])

    points = []
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        point: dict[str, float] = {"timestep": timestep}
        for failure, name in TOLD_BY.items():
            chosen = np.isin(kinds, ("good", failure))
            is_good = kinds[chosen] == "good"
            for arm, values in logits[index].items():
                point[f"{arm}/{failure}"] = float(roc_auc_score(is_good, values[chosen]))
            if index in foreseen:
                # A shape that cannot be tracked neither moves nor stays.
                measured = np.array([each.get(name, 0.0) for each in foreseen[index]])
                point[f"foreseen/{failure}"] = float(roc_auc_score(is_good, measured[chosen]))
        points.append(point)
    return points


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """AUC against the timestep."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, failure in zip(figure.subplots(1, len(TOLD_BY), sharey=True), TOLD_BY, strict=True):
        for name in (*ARMS, "foreseen"):
            there = [point for point in points if f"{name}/{failure}" in point]
            plot_spread(
                axes,
                [point["timestep"] for point in there],
                [point[f"{name}/{failure}"] for point in there],
                label="the foreseen video" if name == "foreseen" else f"reward model, {name.replace('_', ' ')}",
            )
        axes.axhline(0.5, color="gray", linestyle=":")
        axes.invert_xaxis()
        axes.set(title=f"good against {failure}", xlabel="timestep, from noise to video")
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("AUC")
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    root, results_dir = Path(config.output_dir), Path(config.results_dir)
    make_inputs(root, config.seeds)
    arms = config.choose(ARMS)
    run_all([training_stage(root, arm, seed) for seed in config.seeds for arm in arms], root, config.num_parallel)
    pipeline = WanPipeline.from_pretrained(PRETRAINED_DIR)
    captions = [str(caption) for caption in split_captions("train")]
    found = []
    for seed in config.seeds:
        folders = {arm: reward_model_dir(root, arm, seed) / "best" for arm in arms}
        models = {arm: WanRewardModel.from_pretrained(folder).eval() for arm, folder in folders.items()}
        found.append(follow_chains(pipeline, models, captions, seed))
    points = [
        {"timestep": step[0]["timestep"]}
        | {name: mean_and_spread([point[name] for point in step]) for name in step[0] if name != "timestep"}
        for step in zip(*found, strict=True)
    ]
    write_json(results_dir / "decisions.json", {"seeds": config.seeds, "num_videos": len(captions), "points": points})
    plot(points, results_dir / "decisions.png")
    print(f"{results_dir / 'decisions.json'}: {len(points)} steps")


if __name__ == "__main__":
    main()
