"""
The reward at inference: what do more seeds, judged while they are still noise, buy, and what does it cost?

    python -m examples.shapes.experiments.candidates --demo outputs/demo

Starts from a finished demo (`make demo`): its pretrained and its tuned generator, its labels and its reward model. Two
more reward models are trained, a weak one and one that has also seen labelled videos of both generators. Every chain of
held-out captions is walked to its end, scored after each step, and judged by its pixels; a candidate that goes on does
not depend on those that are dropped, so every schedule is computed from the same chains. Resampling and guidance change
the chains and are run for themselves. Writes `results/candidates.json`, a plot, and a page with candidates side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

from examples.shapes.clips import split_captions
from examples.shapes.demo import write_prompts
from examples.shapes.experiments.inputs import merge_manifests
from examples.shapes.experiments.runs import RESULTS_DIR, run_all
from examples.shapes.judge import judge_videos
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, PRETRAINED_DIR
from examples.shapes.stages import Stage, launch, python
from hy_prfl.configs.parser import parse_config
from hy_prfl.flow_matching import row_noise
from hy_prfl.inference.generation import decode_latents
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.models.reward_model import WanRewardModel, score_noised


NUM_STEPS, BATCH_SIZE = 20, 96
# Videos of both generators, of training captions, that the third reward model learns from.
NUM_SAMPLES = {"base": 768, "prfl": 384}
GENERATORS = ("base", "prfl")
REWARD_MODELS = ("weak", "demo", "taught")
# Noise levels at which finished videos, and those that are foreseen, are scored.
TIMESTEPS = (200, 400, 600, 800)
FORESEEN_TIMESTEP = 600


@dataclass(kw_only=True)
class CandidatesConfig:
    """What to run."""

    demo: str = field(default="outputs/demo", metadata={"help": "Folder of a finished demo."})
    output_dir: str = field(
        default="outputs/experiments/candidates", metadata={"help": "Folder for models and chains."}
    )
    results_dir: str = field(default=str(RESULTS_DIR), metadata={"help": "Folder for the JSON file and the plot."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the noise."})
    num_captions: int = field(default=24, metadata={"help": "Held-out captions."})
    num_candidates: int = field(default=16, metadata={"help": "Seeds of each caption."})
    num_parallel: int = field(default=2, metadata={"help": "Runs at a time, each with one thread."})


def lora_options(demo: Path, generator: str) -> list[str]:
    return [] if generator == "base" else ["--lora_path", str(demo / generator)]


def samples_stage(root: Path, demo: Path, generator: str) -> Stage:
    """Videos of a generator with the judge's labels."""
    prompts, samples = root / f"prompts_{generator}.json", root / "samples" / generator
    name = f"samples_{generator}"
    options = ["--prompts", str(prompts), "--output_dir", str(samples), *lora_options(demo, generator)]
    labels = ["--manifest", str(samples / "manifest.json"), "--output_dir", str(root / "labels" / generator)]
    return Stage(name, name, [launch("generate", options), python("annotate", labels)], [f"samples/{generator}"])


def weak_stage(root: Path, demo: Path) -> Stage:
    """A reward model of two blocks, trained for a quarter of the updates."""
    options = ["--train_dataset", str(demo / "latents" / "labelled"), "--output_dir", str(root / "reward_models/weak")]
    options += ["--validation_dataset", str(demo / "latents" / "held_out"), "--num_layers", "2"]
    options += ["--max_train_steps", "110", "--validation_steps", "110", "--checkpointing_steps", "110"]
    return Stage("weak", "weak", [launch("train_reward", options)], ["reward_models/weak"])


def taught_stage(root: Path, demo: Path) -> Stage:
    """The demo's labels and those of the generators' videos, for as many epochs and a half."""
    latents = {name: str(root / "latents" / name) for name in ("all", "validation")}
    encode = [
        launch("preprocess", ["--manifest", str(root / f"{name}.json"), "--output_dir", folder])
        for name, folder in latents.items()
    ]
    options = ["--train_dataset", latents["all"], "--validation_dataset", latents["validation"]]
    options += ["--output_dir", str(root / "reward_models/taught"), "--max_train_steps", "700"]
    options += ["--validation_steps", "350", "--checkpointing_steps", "700"]
    return Stage("taught", "taught", [*encode, launch("train_reward", options)], ["reward_models/taught", "latents"])


def reward_model_dir(root: Path, demo: Path, name: str) -> Path:
    return demo / "reward" / "best" if name == "demo" else root / "reward_models" / name / "best"


@torch.no_grad()
def walk_chains(
    pipeline: WanPipeline, reward_models: Mapping[str, WanRewardModel], captions: Sequence[str], seeds: Sequence[int]
) -> dict[str, np.ndarray]:
    """
    Walk the chains of a batch to the end, and score them after every step.

    Returns:
        `kind` `(batch_size,)`, the judge's verdicts, `frames` `(batch_size, 5, height, width, 3)`, some frames of each,
        and for each reward model `<name>/noisy` and `<name>/foreseen` `(batch_size, NUM_STEPS - 1)`, logits of the
        noisy latents after a step and of the clean ones that the step foresees, and `<name>/clean` `(batch_size, 4)`,
        those of the finished latents at `TIMESTEPS`.
    """
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    text, _ = pipeline.encode_prompt(
        list(captions), do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    scheduler.set_timesteps(NUM_STEPS)
    shape = (pipeline.vae.config.z_dim, 5, 6, 6)
    latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = row_noise("candidates", shape, seed=0).expand_as(latents)
    logits: dict[str, list[torch.Tensor]] = {
        f"{name}/{what}": [] for name in reward_models for what in ("noisy", "foreseen", "clean")
    }

    def score_clean(name: str, clean: torch.Tensor, timestep: float) -> torch.Tensor:
        sigmas = torch.full((len(clean),), timestep / 1000)
        return score_noised(reward_models[name], latents=clean, noise=noise, sigmas=sigmas, encoder_hidden_states=text)

    for index, timestep in enumerate(scheduler.timesteps):
        velocity = transformer(latents, timestep.expand(len(latents)), text).sample
        clean = latents - scheduler.sigmas[index] * velocity
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        if index + 1 < NUM_STEPS:
            following = scheduler.timesteps[index + 1].expand(len(latents))
            for name, model in reward_models.items():
                logits[f"{name}/noisy"].append(model(latents, following, text).logits)
                logits[f"{name}/foreseen"].append(score_clean(name, clean, FORESEEN_TIMESTEP))
    for name in reward_models:
        logits[f"{name}/clean"] = [score_clean(name, latents, timestep) for timestep in TIMESTEPS]
    videos = decode_latents(pipeline.vae, latents)
    kinds = [verdict.kind for verdict in judge_videos(videos, captions)]
    found = {name: torch.stack(values, dim=1).numpy() for name, values in logits.items()}
    return {**found, "kind": np.array(kinds), "frames": videos[:, ::4]}


def chains_file(root: Path, generator: str, seed: int) -> Path:
    return root / "chains" / f"{generator}_{seed}.npz"


def make_chains(config: CandidatesConfig, generator: str, seed: int) -> None:
    """All chains of one generator and seed, `(num_captions, num_candidates, ...)` each array."""
    root, demo = Path(config.output_dir), Path(config.demo)
    path = chains_file(root, generator, seed)
    if path.is_file():
        return
    lora = None if generator == "base" else str(demo / generator)
    pipeline = load_pipeline(str(PRETRAINED_DIR), lora_path=lora, dtype=torch.float32)
    models = {
        name: WanRewardModel.from_pretrained(reward_model_dir(root, demo, name)).eval() for name in REWARD_MODELS
    }
    captions = [str(caption) for caption in split_captions("held_out")][: config.num_captions]
    # Each caption and seed of the experiment has noise of its own.
    jobs = [
        (caption, 10_000 * (seed + 1) + 100 * number + candidate)
        for number, caption in enumerate(captions)
        for candidate in range(config.num_candidates)
    ]
    parts = []
    for start in tqdm(range(0, len(jobs), BATCH_SIZE), desc=path.stem, mininterval=20):
        batch = jobs[start : start + BATCH_SIZE]
        parts.append(walk_chains(pipeline, models, [each[0] for each in batch], [each[1] for each in batch]))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    folded = {
        name: each.reshape(len(captions), config.num_candidates, *each.shape[1:]) for name, each in arrays.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **folded)
    temporary.replace(path)


def make_inputs(config: CandidatesConfig) -> None:
    """Labelled videos and reward models."""
    root, demo = Path(config.output_dir), Path(config.demo)
    for number, generator in enumerate(GENERATORS):
        first = 300_000 + 100_000 * number
        write_prompts(root / f"prompts_{generator}.json", "train", NUM_SAMPLES[generator], first, prefix=generator)
    stages = [samples_stage(root, demo, generator) for generator in GENERATORS]
    run_all([*stages, weak_stage(root, demo)], root, config.num_parallel)
    labels = {
        part: [root / "labels" / name / f"{part}.json" for name in GENERATORS] for part in ("train", "validation")
    }
    merge_manifests([demo / "clips" / "labelled" / "manifest.json", *labels["train"]], root / "all.json")
    merge_manifests(labels["validation"], root / "validation.json")
    run_all([taught_stage(root, demo)], root, config.num_parallel)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(CandidatesConfig, argv, description=__doc__)
    make_inputs(config)
    for seed in config.seeds:
        for generator in GENERATORS:
            make_chains(config, generator, seed)


if __name__ == "__main__":
    main()
