"""
Trains the tiny Wan pipeline on shapes, first the VAE and then the generator, and saves it as an ordinary pipeline folder.

    python -m examples.shapes.pretrain --output_dir outputs/shapes/pipeline

Like a real base model, the generator is trained on good and bad clips, so it generates both. The text encoder keeps its
random weights: its embeddings distinguish the few words of the captions, and no more is needed here. Every update draws
its clips and noise from the seed and the number of the update. So a run that was stopped continues with the same result.
Its state is in `<output_dir>.training` until the run is complete.

This script made `PRETRAINED_DIR` with its default options. `pretraining.json` there records them.
"""

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from examples.shapes.clips import FAILURES, NUM_FRAMES, Clip, draw_clip, render_clip, split_captions
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.hashes import hash_file
from hy_prfl.flow_matching import UniformLevels, add_noise, make_generator, sigmas_to_timesteps, velocity_target
from hy_prfl.inference.tiny_pipelines import build_pipeline


PRETRAINED_DIR = Path(__file__).parent / "pretrained"
RECORD = "pretraining.json"

LIBRARIES = ("torch", "diffusers", "transformers")

MAX_SEQUENCE_LENGTH = 16
ATTENTION_HEAD_DIM = 32

# First and last layers of VAE and transformer, which AdamW trains. Muon trains the matrices between them, with a learning
# rate that is larger by this factor.
OUTER_LAYERS = ("conv_in", "conv_out", "patch_embedding", "condition_embedder", "proj_out")
MUON_FACTOR = 2.5

# First part of the keys of the random generators, so that all of their seeds differ.
VAE_CLIPS, VAE_NOISE, GENERATOR_NOISE = 1, 2, 3

# Stages of the VAE's training: share of the steps, frames of a crop, crops in an update. Single frames are cheap and
# enough for shapes and colours, short crops for motion. Whole clips come last, for long-range motion.
VAE_STAGES = ((0.4, 1, 4), (0.3, 5, 2), (0.15, 9, 1), (0.15, NUM_FRAMES, 1))

# The VAE is built like that of Wan 2.2, with residual shortcuts and 2x2 patches, but with one level less. So it has
# the stride 4 x 8 x 8 and the 16 channels of Wan 2.1, at a quarter of the cost.
VAE_CONFIG = {
    "is_residual": True,
    "base_dim": 16,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}


# Failures that a generator of this size can learn. With "jittering" (random in every frame) or "wrong_direction" among its
# clips, all of its motion trembles.
CRISP_FAILURES = ("frozen", "deforming", "vanishing")
# Failures of the pretrained pipeline in this folder.
SHIPPED_FAILURES = ("frozen", "vanishing")


@dataclass(kw_only=True)
class PretrainConfig:
    """Options of `pretrain`."""

    output_dir: str = field(metadata={"help": "Folder for the pipeline."})
    num_clips: int = field(
        default=5000, metadata={"help": "Clips for the generator. They are rendered, not read, and encoded once."}
    )
    good_share: float = field(default=0.5, metadata={"help": "Share of good clips among all."})
    failures: list[str] = field(
        default_factory=lambda: list(FAILURES), metadata={"help": "Failures of the bad clips."}
    )
    vae_steps: int = field(default=1600, metadata={"help": "Updates of the VAE, each on new clips."})
    vae_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the VAE."})
    kl_weight: float = field(default=5e-5, metadata={"help": "Weight of the KL divergence in the VAE's loss."})
    generator_steps: int = field(default=6000, metadata={"help": "Updates of the generator."})
    generator_batch_size: int = field(default=32, metadata={"help": "Clips in one update of the generator."})
    generator_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the generator."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the average of the generator's weights."})
    refinement_steps: int = field(default=3000, metadata={"help": "Updates of the generator's second phase."})
    refinement_learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak learning rate of that phase."})
    refinement_ema_decay: float = field(default=0.998, metadata={"help": "Decay of the average in that phase."})
    refinement_good_share: float = field(default=0.6, metadata={"help": "Share of good clips in that phase."})
    refinement_failures: list[str] = field(
        default_factory=lambda: list(CRISP_FAILURES), metadata={"help": "Failures of the bad clips in that phase."}
    )
    settling_steps: int = field(default=900, metadata={"help": "Updates of the generator's third phase."})
    settling_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of that phase."})
    settling_ema_decay: float = field(default=0.99, metadata={"help": "Decay of the average in that phase."})
    settling_good_share: float = field(default=0.5, metadata={"help": "Share of good clips in that phase."})
    settling_failures: list[str] = field(
        default_factory=lambda: list(SHIPPED_FAILURES), metadata={"help": "Failures of the bad clips in that phase."}
    )
    num_layers: int = field(default=6, metadata={"help": "Transformer blocks of the generator."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads, 32 channels each."})
    flow_shift: float = field(default=3.0, metadata={"help": "Shift of noise levels, in training and sampling."})
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of prompts replaced by the empty one."})
    checkpointing_steps: int = field(default=200, metadata={"help": "The run's state is saved every so many updates."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, clips and noise."})

    def __post_init__(self) -> None:
        counts = (
            "num_clips",
            "vae_steps",
            "generator_steps",
            "refinement_steps",
            "settling_steps",
            "generator_batch_size",
            "num_layers",
        )
        for name in counts:
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.checkpointing_steps >= 1, "checkpointing_steps", self.checkpointing_steps, "at least 1")


@dataclass(frozen=True)
class Phase:
    """A phase of the generator's training, with its own clips."""

    name: str
    num_steps: int
    learning_rate: float
    ema_decay: float
    good_share: float
    failures: list[str]
    seed: int

    def draw_clip(self, index: int) -> Clip:
        """Clip of this phase. Its seed is never used by `examples.shapes.clips`."""
        return draw_clip(
            index,
            captions=split_captions("train"),
            good_share=self.good_share,
            failures=self.failures,
            seed=1_000_000 + self.seed,
        )


def phases_of(config: PretrainConfig) -> list[Phase]:
    """The phases in order: with all failures, with `CRISP_FAILURES`, with `SHIPPED_FAILURES`, unless options differ."""
    phases = [
        Phase(
            "generator",
            num_steps=config.generator_steps,
            learning_rate=config.generator_learning_rate,
            ema_decay=config.ema_decay,
            good_share=config.good_share,
            failures=config.failures,
            seed=config.seed,
        )
    ]
    for number, name in enumerate(("refinement", "settling"), 1):
        options = {
            option: getattr(config, f"{name}_{option}")
            for option in ("learning_rate", "ema_decay", "good_share", "failures")
        }
        phases.append(Phase(name, num_steps=getattr(config, f"{name}_steps"), seed=config.seed + number, **options))
    return phases


def clips_options() -> list[str]:
    """Options of `examples.shapes.clips` for clips like those of the last phase of the pretrained pipeline."""
    phase = phases_of(PretrainConfig(output_dir=""))[-1]
    return ["--good_share", str(phase.good_share), "--failures", *phase.failures]


def pretrain(config: PretrainConfig) -> WanPipeline:
    """
    Build the pipeline, train its VAE and its transformer, save it with a record of the run, and return it.

    Raises:
        ValueError: If the folder has the state of a stopped run with other options.
    """
    output_dir = Path(config.output_dir)
    state_dir = output_dir.with_name(f"{output_dir.name}.training")
    options = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    open_state(state_dir, options)
    pipeline = build_pipeline(
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=ATTENTION_HEAD_DIM,
        ffn_dim=4 * ATTENTION_HEAD_DIM * config.num_attention_heads,
        text_dim=64,
        flow_shift=config.flow_shift,
        vae_config=VAE_CONFIG,
        seed=config.seed,
    )
    pipeline.set_progress_bar_config(disable=True)
    runs = {"vae": train_vae(pipeline.vae, config, state_dir)}
    for phase in phases_of(config):
        start = time.monotonic()
        clips = [phase.draw_clip(index) for index in range(config.num_clips)]
        latents = encode_clips(pipeline.vae, clips, state_dir / f"{phase.name}_latents.pt")
        encoding = time.monotonic() - start
        if phase.name == "generator":
            set_statistics(pipeline.vae, latents)
        run = train_generator(
            pipeline.transformer,
            normalize(pipeline.vae, latents),
            encode_prompts(pipeline, [str(clip.caption) for clip in clips]),
            encode_prompts(pipeline, [""]),
            phase,
            config,
            state_dir,
        )
        runs[phase.name] = {**run, "seconds": run["seconds"] + encoding}
    pipeline.save_pretrained(output_dir)
    write_record(output_dir, options, runs)
    shutil.rmtree(state_dir)
    return pipeline


def open_state(state_dir: Path, options: dict[str, Any]) -> None:
    """Create the folder for the state of a run. If it exists, its options must be the same."""
    path = state_dir / "options.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(name for name in options | found if options.get(name) != found.get(name))
        if different:
            raise ValueError(
                f"'{state_dir}' holds a run with other options ({', '.join(different)}). Delete it, or choose another "
                "`output_dir`."
            )
    state_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options, indent=1), encoding="utf-8")


def train_vae(vae: AutoencoderKLWan, config: PretrainConfig, state_dir: Path) -> dict[str, Any]:
    """Train the VAE to reconstruct crops of clips that are rendered for each update."""
    num_steps = config.vae_steps
    ends = [sum(stage[0] for stage in VAE_STAGES[: index + 1]) * num_steps for index in range(len(VAE_STAGES))]
    with torch.no_grad():
        # Start with little posterior noise: with the usual deviation of 1, the first thousand updates learn only to reduce it.
        vae.quant_conv.bias[vae.config.z_dim :] = -6.0
        # Single frames do not train the past of causal kernels. Zeros there do no harm when the clips come.
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 5 and "time_conv" not in name:
                parameter[:, :, :-1] = 0.0

    def loss_at(step: int) -> torch.Tensor:
        stage = next((index for index, end in enumerate(ends) if step < end), len(ends) - 1)
        _, num_frames, batch_size = VAE_STAGES[stage]
        pixels = draw_crops(config, step, num_frames, batch_size)
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample(make_generator(VAE_NOISE, config.seed, step))).sample
        # The shapes cover a twentieth of the pixels. Colour increases the weight, so that they count as much as the wall.
        weight = 1 + 3 * (pixels.amax(dim=1, keepdim=True) - pixels.amin(dim=1, keepdim=True))
        reconstruction = (weight * (rebuilt - pixels) ** 2).mean()
        return reconstruction + config.kl_weight * posterior.kl().sum() / posterior.mean.numel()

    return run_training(
        vae,
        loss_at,
        num_steps=num_steps,
        learning_rate=config.vae_learning_rate,
        ema_decay=None,
        state_path=state_dir / "vae.pt",
        checkpointing_steps=config.checkpointing_steps,
    )


def draw_crops(config: PretrainConfig, step: int, num_frames: int, batch_size: int) -> torch.Tensor:
    """Crops `(batch_size, 3, num_frames, height, width)` in [-1, 1] for one update, each from another clip."""
    generator = make_generator(VAE_CLIPS, config.seed, step)
    phase = phases_of(config)[0]
    crops = []
    for index in torch.randint(2**31, (batch_size,), generator=generator).tolist():
        first = int(torch.randint(NUM_FRAMES - num_frames + 1, (), generator=generator))
        crops.append(render_video(phase.draw_clip(index))[:, first : first + num_frames])
    return to_pixels(torch.stack(crops))


def render_video(clip: Clip) -> torch.Tensor:
    """Pixels of a clip, `uint8` of shape `(3, num_frames, height, width)`."""
    return torch.from_numpy(render_clip(clip)).permute(3, 0, 1, 2)


def to_pixels(videos: torch.Tensor) -> torch.Tensor:
    """`uint8` to [-1, 1]."""
    return videos.float() / 127.5 - 1


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Sequence[Clip], path: Path) -> torch.Tensor:
    """Latents of clips before normalization. They are stored in `path` and read from there the next time."""
    if not path.is_file():
        batches = [
            vae.encode(
                to_pixels(torch.stack([render_video(clip) for clip in clips[first : first + 16]]))
            ).latent_dist.mode()
            for first in tqdm(range(0, len(clips), 16), desc="latents", mininterval=5)
        ]
        save_state(torch.cat(batches), path)
    return torch.load(path, weights_only=True)


def set_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Write mean and standard deviation of the latents into the VAE's config, as in Wan's VAE."""
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def normalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalized latents, the input of the transformer."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


@torch.no_grad()
def encode_prompts(pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
    """Embeddings `(num_prompts, MAX_SEQUENCE_LENGTH, text_dim)`, padded with zeros as in the pipeline."""
    return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH)[
        0
    ]


def train_generator(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    null_prompt_embeds: torch.Tensor,
    phase: Phase,
    config: PretrainConfig,
    state_dir: Path,
) -> dict[str, Any]:
    """Train the generator by flow matching. It ends with the moving average of its weights."""

    def loss_at(step: int) -> torch.Tensor:
        generator = make_generator(GENERATOR_NOISE, phase.seed, step)
        index = torch.randint(len(latents), (config.generator_batch_size,), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < config.prompt_dropout
        noise = torch.randn(latents[index].shape, generator=generator)
        sigmas = UniformLevels(config.flow_shift).sample([generator] * len(index))
        model_pred = transformer(
            hidden_states=add_noise(latents[index], noise, sigmas),
            timestep=sigmas_to_timesteps(sigmas),
            encoder_hidden_states=torch.where(dropped.view(-1, 1, 1), null_prompt_embeds, prompt_embeds[index]),
        ).sample
        return F.mse_loss(model_pred, velocity_target(latents[index], noise))

    return run_training(
        transformer,
        loss_at,
        num_steps=phase.num_steps,
        learning_rate=phase.learning_rate,
        ema_decay=phase.ema_decay,
        state_path=state_dir / f"{phase.name}.pt",
        checkpointing_steps=config.checkpointing_steps,
    )


def run_training(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    ema_decay: float | None,
    state_path: Path,
    checkpointing_steps: int,
) -> dict[str, Any]:
    """
    Train a model with Muon and AdamW, linear warm-up and linear decay. Continues from `state_path` if it exists.

    Args:
        loss_at (`Callable`):
            Returns the loss of an update, given its number.
        ema_decay (`float`, *optional*):
            If given, the model ends with the moving average of its weights, otherwise with the last weights.

    Returns:
        `dict`: `seconds`, and `losses` of all updates.
    """
    matrices, optimizers = build_optimizers(model, learning_rate)
    schedules = [warm_up_and_decay(optimizer, num_steps) for optimizer in optimizers]
    average = None if ema_decay is None else EMAModel(model.parameters(), decay=ema_decay)
    parts = {"model": model, "average": average}
    for index, (optimizer, schedule) in enumerate(zip(optimizers, schedules, strict=True)):
        parts |= {f"optimizer_{index}": optimizer, f"schedule_{index}": schedule}
    losses: list[float] = []
    seconds = 0.0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        losses, seconds = state["losses"], state["seconds"]
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
    start = time.monotonic() - seconds
    model.train()
    progress = tqdm(range(len(losses), num_steps), desc=state_path.stem, mininterval=5)
    for step in progress:
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter, matrix in matrices:
            matrix.grad = None if parameter.grad is None else parameter.grad.reshape(matrix.shape)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        if average is not None:
            average.step(model.parameters())
        losses.append(loss.item())
        if len(losses) % checkpointing_steps == 0 or len(losses) == num_steps:
            state = {name: part.state_dict() for name, part in parts.items() if part is not None}
            save_state({**state, "losses": losses, "seconds": time.monotonic() - start}, state_path)
    if average is not None:
        average.copy_to(model.parameters())
    model.eval()
    return {"losses": losses, "seconds": time.monotonic() - start}


def build_optimizers(
    model: torch.nn.Module, learning_rate: float
) -> tuple[list[tuple[torch.nn.Parameter, torch.Tensor]], list[torch.optim.Optimizer]]:
    """
    Muon for the inner matrices, which include kernels of convolutions, and AdamW for the rest.

    For the VAE, one update by Muon gains more than two by AdamW. Muon accepts only matrices, so it gets views of the
    weights.

    Returns:
        The weights that Muon trains, each with its view, and both optimizers. The caller must set `.grad` of the views.
    """
    matrices = [
        (parameter, parameter.detach().view(len(parameter), -1).requires_grad_())
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and 1 < len(parameter) < parameter.numel()
        if not any(layer in name for layer in OUTER_LAYERS)
    ]
    inner = {id(parameter) for parameter, _ in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inner]
    optimizers = [
        torch.optim.Muon(
            [matrix for _, matrix in matrices],
            lr=MUON_FACTOR * learning_rate,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    ]
    return matrices, optimizers


def warm_up_and_decay(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a twentieth of the steps, then linear decay to zero."""
    warm_up = max(num_steps // 20, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (num_steps - step) / num_steps)
    )


def save_state(state: Any, path: Path) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}")
    torch.save(state, temporary)
    temporary.replace(path)


def write_record(output_dir: Path, options: dict[str, Any], runs: dict[str, Any]) -> None:
    """Write `pretraining.json`: how the pipeline in this folder was made, and the hashes of its files."""
    files = sorted(path for path in output_dir.rglob("*") if path.is_file() and path.name != RECORD)
    record = {
        "options": options,
        "seconds": {name: round(run["seconds"], 1) for name, run in runs.items()},
        "losses": {name: summarize_losses(run["losses"]) for name, run in runs.items()},
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES},
        "sha256": {path.relative_to(output_dir).as_posix(): hash_file(path) for path in files},
    }
    (output_dir / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def summarize_losses(losses: Sequence[float], num_means: int = 20) -> list[dict[str, float]]:
    """Means of the loss over equal parts of a run, each with the number of updates at the end of its part."""
    ends = sorted({round(len(losses) * part / num_means) for part in range(1, num_means + 1)} - {0})
    parts = pairwise([0, *ends])
    return [{"step": end, "loss": round(sum(losses[first:end]) / (end - first), 5)} for first, end in parts]


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PretrainConfig, argv, description=__doc__)
    start = time.monotonic()
    pretrain(config)
    print(f"{Path(config.output_dir)}: a pipeline, pretrained in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
