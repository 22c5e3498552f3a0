"""
The reward at inference: what do more seeds, judged while they are still noise, buy, and what does it cost?

    python -m examples.shapes.experiments.candidates --demo outputs/demo

Starts from a demo (`make demo`): its pretrained and its tuned generator, its labels and its reward model. Two more reward
models are trained, a weak one, and one that goes on from the demo's with labelled videos of the generator. Every chain
of held-out captions is walked to its end, scored after each step, and judged by its pixels; a candidate that goes on does
not depend on those that are dropped, so every schedule is computed from the same chains. Resampling and guidance change
the chains, and are run for themselves. Writes `results/candidates.json`, a plot, and a page with candidates side by side.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets, load_from_disk

from examples.shapes.clips import split_captions
from examples.shapes.experiments.candidates_results import summarize_chains, write_results
from examples.shapes.experiments.runs import RESULTS_DIR, run_all
from examples.shapes.experiments.sampling import BATCH_SIZE, NUM_STEPS, SHAPE, load_generator, own_videos, walk_chains
from examples.shapes.judge import judge_videos
from examples.shapes.pretrain import MAX_SEQUENCE_LENGTH, PRETRAINED_DIR
from examples.shapes.stages import Stage, launch
from hy_prfl.configs.keep import parse_keep
from hy_prfl.configs.parser import parse_config
from hy_prfl.flow_matching import row_noise
from hy_prfl.inference.candidate_settings import CandidateSettings, RewardGuidance
from hy_prfl.inference.candidates import sample_candidates
from hy_prfl.inference.generation import decode_latents
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.models.reward_model import WanRewardModel, score_noised


# Generator -> candidates of each caption.
GENERATORS = {"base": 16, "prfl": 16}
REWARD_MODELS = ("weak", "demo", "taught")
# The generator's own videos, of training captions, that the third reward model learns from.
NUM_OWN = 512
# Noise levels at which finished videos are scored.
TIMESTEPS = (200, 400, 600, 800)
FINAL_TIMESTEPS = (400, 600, 800)
# What changes the chains: name -> candidates, and how they are sampled.
CHANGED: dict[str, tuple[int, CandidateSettings]] = {
    "resampled, 4 particles": (
        4,
        CandidateSettings(keep=parse_keep("6:2,10:2"), resample=True, batch_size=8, final_timesteps=FINAL_TIMESTEPS),
    ),
    "guided, .1": (1, CandidateSettings(guidance=RewardGuidance(scale=0.1, first_step=5, last_step=14))),
    "guided, .3": (1, CandidateSettings(guidance=RewardGuidance(scale=0.3, first_step=5, last_step=14))),
}


@dataclass(kw_only=True)
class CandidatesConfig:
    """What to run."""

    demo: str = field(default="outputs/demo", metadata={"help": "Folder of a demo."})
    output_dir: str = field(
        default="outputs/experiments/candidates", metadata={"help": "Folder for models and chains."}
    )
    results_dir: str = field(default=str(RESULTS_DIR), metadata={"help": "Folder for the JSON file and the plot."})
    generators: list[str] = field(default_factory=lambda: list(GENERATORS), metadata={"help": "base, prfl or both."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the noise."})
    num_captions: int = field(default=24, metadata={"help": "Held-out captions."})
    num_parallel: int = field(default=2, metadata={"help": "Processes, each with one thread."})


def reward_model_dir(root: Path, demo: Path, name: str) -> Path:
    return demo / "reward" / "best" if name == "demo" else root / "reward_models" / name / "best"


def lora_of(demo: Path, generator: str) -> Path | None:
    return None if generator == "base" else demo / generator


def weak_stage(root: Path, demo: Path) -> Stage:
    """A reward model of two blocks, trained for a quarter of the updates."""
    options = ["--train_dataset", str(demo / "latents" / "labelled"), "--output_dir", str(root / "reward_models/weak")]
    options += ["--validation_dataset", str(demo / "latents" / "held_out"), "--num_layers", "2"]
    options += ["--max_train_steps", "110", "--validation_steps", "110", "--checkpointing_steps", "110"]
    return Stage("weak", "weak", [launch("train_reward", options)], ["reward_models/weak"])


def taught_stage(root: Path, demo: Path) -> Stage:
    """The demo's reward model, trained on with the generator's own videos beside the demo's labels."""
    options = ["--reward_model", str(reward_model_dir(root, demo, "demo"))]
    options += ["--train_dataset", str(root / "own_and_real"), "--validation_dataset", str(root / "own_validation")]
    options += ["--output_dir", str(root / "reward_models/taught"), "--learning_rate", "5e-4"]
    options += ["--head_learning_rate", "5e-4", "--max_train_steps", "200"]
    options += ["--validation_steps", "200", "--checkpointing_steps", "200"]
    return Stage("taught", "taught", [launch("train_reward", options)], ["reward_models/taught"])


def make_own_videos(root: Path, demo: Path) -> None:
    """Latent datasets of the generator's own videos, with the judge's labels: a fifth of them for validation."""
    if (root / "own_validation").is_dir():
        return
    labelled = load_from_disk(str(demo / "latents" / "labelled"))
    own = own_videos(load_generator(), labelled, range(500_000, 500_000 + NUM_OWN), prefix="own")
    num_train = NUM_OWN * 4 // 5
    train, validation = own.select(range(num_train)), own.select(range(num_train, NUM_OWN))
    concatenate_datasets([labelled, train]).save_to_disk(str(root / "own_and_real"))
    validation.save_to_disk(str(root / "own_validation"))


@torch.no_grad()
def score_chains(
    model: WanRewardModel, latents: torch.Tensor, text: torch.Tensor, timesteps: torch.Tensor
) -> dict[str, np.ndarray]:
    """
    Score the chains of a batch.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, NUM_STEPS, 16, 5, 6, 6)`):
            After each step.
        timesteps (`torch.Tensor` of shape `(NUM_STEPS,)`):
            The sampler's grid.

    Returns:
        `noisy` `(batch_size, NUM_STEPS - 1)`, logits of the noisy latents after each step but the last, and `clean`
        `(batch_size, 4)`, those of the finished latents at `TIMESTEPS`.
    """
    count = len(latents)
    noise = row_noise("candidates", SHAPE, seed=0).expand(count, *SHAPE)
    noisy = [model(latents[:, step - 1], timesteps[step].expand(count), text).logits for step in range(1, NUM_STEPS)]
    clean = [
        score_noised(
            model,
            latents=latents[:, -1],
            noise=noise,
            sigmas=torch.full((count,), timestep / 1000),
            conditioning=Conditioning(text),
        )
        for timestep in TIMESTEPS
    ]
    return {name: torch.stack(values, dim=1).numpy() for name, values in (("noisy", noisy), ("clean", clean))}


def noise_seed(seed: int, caption: int, candidate: int) -> int:
    """Each caption and seed of the experiment has noise of its own."""
    return 100_000 * (seed + 1) + 100 * caption + candidate


def chains_file(root: Path, generator: str, seed: int) -> Path:
    return root / "chains" / f"{generator}_{seed}.npz"


def make_chains(config: CandidatesConfig, generator: str, seed: int) -> None:
    """All chains of one generator and seed, `(num_captions, num_candidates, ...)` each array."""
    torch.set_num_threads(1)
    path = chains_file(Path(config.output_dir), generator, seed)
    if path.is_file():
        return
    pipeline, num_candidates = load_generator(lora_of(Path(config.demo), generator)), GENERATORS[generator]
    captions = held_out_captions(config)
    jobs = [(number, candidate) for number in range(len(captions)) for candidate in range(num_candidates)]
    parts = []
    for start in range(0, len(jobs), BATCH_SIZE):
        batch = jobs[start : start + BATCH_SIZE]
        seeds = [noise_seed(seed, number, candidate) for number, candidate in batch]
        parts.append(walk_chains(pipeline, [captions[number] for number, _ in batch], seeds))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    save(path, {name: each.reshape(len(captions), num_candidates, *each.shape[1:]) for name, each in arrays.items()})


def make_scores(config: CandidatesConfig, generator: str, seed: int, name: str) -> None:
    """Scores of these chains by one reward model."""
    torch.set_num_threads(1)
    root, demo = Path(config.output_dir), Path(config.demo)
    path = scores_file(root, generator, seed, name)
    if path.is_file():
        return
    model = WanRewardModel.from_pretrained(reward_model_dir(root, demo, name)).eval()
    scheduler = load_scheduler(str(PRETRAINED_DIR))
    scheduler.set_timesteps(NUM_STEPS)
    with np.load(chains_file(root, generator, seed)) as chains:
        latents, text = (torch.from_numpy(chains[each]) for each in ("latents", "text"))
    shape = latents.shape[:2]
    batches = zip(latents.flatten(0, 1).split(BATCH_SIZE), text.flatten(0, 1).split(BATCH_SIZE), strict=True)
    parts = [score_chains(model, *batch, scheduler.timesteps) for batch in batches]
    save(path, {each: np.concatenate([part[each] for part in parts]).reshape(*shape, -1) for each in parts[0]})


def load_chains(root: Path, generator: str, seed: int) -> dict[str, np.ndarray]:
    """Verdicts and frames, and `<model>/noisy` and `<model>/clean` of each reward model."""
    with np.load(chains_file(root, generator, seed)) as chains:
        found = {name: chains[name] for name in ("kind", "frames")}
    for model in REWARD_MODELS:
        with np.load(scores_file(root, generator, seed, model)) as scores:
            found |= {f"{model}/{name}": scores[name] for name in ("noisy", "clean")}
    return found


def held_out_captions(config: CandidatesConfig) -> list[str]:
    return [str(caption) for caption in split_captions("held_out")][: config.num_captions]


def make_changed(config: CandidatesConfig, generator: str, seed: int, name: str) -> None:
    """Videos of one way of sampling that changes the chains, one for each caption, with the demo's reward model."""
    torch.set_num_threads(1)
    root, demo = Path(config.output_dir), Path(config.demo)
    path = changed_file(root, generator, seed, name)
    if path.is_file():
        return
    num_candidates, settings = CHANGED[name]
    pipeline = load_generator(lora_of(demo, generator))
    reward_model = WanRewardModel.from_pretrained(reward_model_dir(root, demo, "demo")).eval()
    captions = held_out_captions(config)
    kinds, counts = [], []
    for number, caption in enumerate(captions):
        result = sample_candidates(
            pipeline,
            reward_model,
            [noise_seed(seed, number, candidate) for candidate in range(num_candidates)],
            settings,
            output_type="latent",
            prompt=caption,
            height=48,
            width=48,
            num_frames=17,
            num_inference_steps=NUM_STEPS,
            guidance_scale=1.0,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )
        videos = decode_latents(pipeline.vae, result.frames[None])
        kinds.append(judge_videos(videos, [caption])[0].kind)
        counts.append([result.num_forwards, result.num_reward_forwards, result.num_reward_backwards])
    save(path, {"kind": np.array(kinds), "counts": np.array(counts)})


def changed_file(root: Path, generator: str, seed: int, name: str) -> Path:
    return root / "changed" / f"{generator}_{name.replace(', ', '_').replace(' ', '_')}_{seed}.npz"


def scores_file(root: Path, generator: str, seed: int, model: str) -> Path:
    return root / "scores" / f"{generator}_{seed}_{model}.npz"


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(CandidatesConfig, argv, description=__doc__)
    root, demo = Path(config.output_dir), Path(config.demo)
    make_own_videos(root, demo)
    run_all([weak_stage(root, demo), taught_stage(root, demo)], root, config.num_parallel)
    pairs = [(generator, seed) for generator in config.generators for seed in config.seeds]
    with ProcessPoolExecutor(config.num_parallel, multiprocessing.get_context("spawn")) as pool:
        changed = [(*pair, name) for pair in pairs for name in CHANGED]
        scored = [(*pair, name) for pair in pairs for name in REWARD_MODELS]
        for function, jobs in ((make_chains, pairs), (make_scores, scored), (make_changed, changed)):
            list(pool.map(partial(call, function, config), jobs))
    results = {
        generator: summarize_chains(
            [load_chains(root, generator, seed) for seed in config.seeds],
            {name: [load(changed_file(root, generator, seed, name)) for seed in config.seeds] for name in CHANGED},
        )
        for generator in config.generators
    }
    shown = load_chains(root, "base", config.seeds[0])
    write_results(Path(config.results_dir), results, config.seeds, shown, held_out_captions(config))


def call(function: Callable[..., None], config: CandidatesConfig, job: tuple[Any, ...]) -> None:
    function(config, *job)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    main()
