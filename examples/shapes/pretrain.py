"""
Trains the tiny Wan pipeline on shapes, VAE first and generator next, and saves it as an ordinary pipeline folder.

    python -m examples.shapes.pretrain --output_dir outputs/shapes/pipeline

Like a real base model the generator sees good and bad clips alike, so it makes both. The text encoder stays random:
its embeddings tell the few words of the captions apart, which is all that is needed here.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from examples.shapes.clips import FAILURES, draw_clip, render_clip, split_captions
from examples.shapes.pipeline import build_pipeline
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.flow_matching import add_noise, sample_sigmas, sigmas_to_timesteps, velocity_target


MAX_SEQUENCE_LENGTH = 16

# Stages of the VAE's training: share of the steps, frames, height and width of the crops, batch size. Pictures are
# cheap and teach shapes and colours; short crops teach motion; whole clips, last, the borders and the long range.
VAE_STAGES = ((0.5, 1, 48, 2), (0.42, 5, 48, 1), (0.08, 17, 48, 1))

# The VAE is built like that of Wan 2.2, with shortcuts around its levels and 2x2 patches as its pixels, but with one
# level less: the same stride 4 x 8 x 8 and 16 channels as Wan 2.1, at a quarter of the cost.
VAE_CONFIG = {
    "is_residual": True,
    "base_dim": 16,
    "dim_mult": [1, 2, 2],
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}


@dataclass(kw_only=True)
class PretrainConfig:
    """Size and length of the pretraining."""

    output_dir: str = field(metadata={"help": "Folder for the pipeline."})
    num_clips: int = field(default=1000, metadata={"help": "Clips to learn from; they are drawn, not read."})
    good_share: float = field(default=0.4, metadata={"help": "Share of good clips among them."})
    failures: list[str] = field(default_factory=lambda: list(FAILURES), metadata={"help": "How the others fail."})
    vae_steps: int = field(default=1100, metadata={"help": "Updates of the VAE."})
    vae_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the VAE."})
    generator_steps: int = field(default=900, metadata={"help": "Updates of the generator."})
    generator_batch_size: int = field(default=16, metadata={"help": "Clips in one update of the generator."})
    generator_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the generator."})
    num_layers: int = field(default=6, metadata={"help": "Transformer blocks of the generator."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads, 24 channels each."})
    flow_shift: float = field(default=3.0, metadata={"help": "Shift of noise levels, in training and sampling."})
    prompt_dropout: float = field(default=0.1, metadata={"help": "Share of prompts replaced by the empty one."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, clips and noise."})

    def __post_init__(self) -> None:
        for name in ("num_clips", "vae_steps", "generator_steps", "generator_batch_size", "num_layers"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def pretrain(config: PretrainConfig) -> WanPipeline:
    """Build the pipeline, train its VAE and its transformer, save it, and return it."""
    pipeline = build_pipeline(
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=24,
        ffn_dim=4 * 24 * config.num_attention_heads,
        text_dim=64,
        flow_shift=config.flow_shift,
        vae_config=VAE_CONFIG,
        seed=config.seed,
    )
    pipeline.set_progress_bar_config(disable=True)
    captions = split_captions("train")
    clips = [
        draw_clip(
            index,
            captions=captions,
            good_share=config.good_share,
            failures=config.failures,
            seed=1_000_000 + config.seed,
        )
        for index in range(config.num_clips)
    ]
    videos = torch.stack([torch.from_numpy(render_clip(clip)).permute(3, 0, 1, 2) for clip in clips])
    train_vae(pipeline.vae, videos, config.vae_steps, config.vae_learning_rate, seed=config.seed)
    latents = encode_videos(pipeline.vae, videos)
    train_generator(
        pipeline.transformer,
        latents,
        encode_prompts(pipeline, [str(clip.caption) for clip in clips]),
        encode_prompts(pipeline, [""]),
        config,
    )
    pipeline.save_pretrained(config.output_dir)
    return pipeline


def train_vae(vae: AutoencoderKLWan, videos: torch.Tensor, num_steps: int, learning_rate: float, seed: int) -> None:
    """Train the VAE to rebuild crops of `uint8` videos `(num_clips, 3, num_frames, height, width)`."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae.train()
    with torch.no_grad():
        # Start with little posterior noise: at its usual deviation of 1 the first thousand updates learn nothing else.
        vae.quant_conv.bias[vae.config.z_dim :] = -6.0
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = warm_up_and_decay(optimizer, num_steps)
    ends = [round(num_steps * sum(stage[0] for stage in VAE_STAGES[: index + 1])) for index in range(len(VAE_STAGES))]
    progress = tqdm(range(num_steps), desc="VAE", mininterval=5)
    for step in progress:
        stage = next((index for index, end in enumerate(ends) if step < end), len(ends) - 1)
        pixels = draw_crops(videos, *VAE_STAGES[stage][1:], generator)
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        # The shapes are a twentieth of the pixels and the only ones with a colour; they count as much as the wall.
        weight = 1 + 3 * (pixels.amax(dim=1, keepdim=True) - pixels.amin(dim=1, keepdim=True))
        reconstruction = (weight * (rebuilt - pixels) ** 2).mean()
        loss = reconstruction + 1e-5 * posterior.kl().sum() / posterior.mean.numel()
        update(vae, optimizer, schedule, loss)
        progress.set_postfix(reconstruction=f"{reconstruction.item():.3f}", refresh=False)
    vae.eval()


def draw_crops(
    videos: torch.Tensor, num_frames: int, size: int, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    """Random crops in [-1, 1], on the grid of the VAE's latents so that it meets the walls as in whole clips."""

    def draw(stop: int) -> int:
        return int(torch.randint(stop, (), generator=generator))

    crops = []
    for _ in range(batch_size):
        video = videos[draw(len(videos))]
        first = draw(video.shape[1] - num_frames + 1)
        top, left = 8 * draw((video.shape[2] - size) // 8 + 1), 8 * draw((video.shape[3] - size) // 8 + 1)
        crops.append(video[:, first : first + num_frames, top : top + size, left : left + size])
    return torch.stack(crops).float() / 127.5 - 1


@torch.no_grad()
def encode_videos(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    """Normalised latents of videos; writes their mean and deviation into the VAE's config, as real VAEs have them."""
    batches = [
        vae.encode(batch.float() / 127.5 - 1).latent_dist.mode()
        for batch in tqdm(videos.split(16), desc="latents", mininterval=5)
    ]
    latents = torch.cat(batches)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode_prompts(pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
    """Embeddings `(num_prompts, MAX_SEQUENCE_LENGTH, text_dim)`, padded with zeros as the pipeline does."""
    return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH)[
        0
    ]


def train_generator(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    null_prompt_embeds: torch.Tensor,
    config: PretrainConfig,
) -> None:
    """Train the generator by flow matching; it ends with the average of its weights."""
    generator = torch.Generator().manual_seed(config.seed)
    transformer.train()
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=config.generator_learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = warm_up_and_decay(optimizer, config.generator_steps)
    average = EMAModel(transformer.parameters(), decay=0.99)
    progress = tqdm(range(config.generator_steps), desc="generator", mininterval=5)
    for _ in progress:
        index = torch.randint(len(latents), (config.generator_batch_size,), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < config.prompt_dropout
        encoder_hidden_states = torch.where(dropped.view(-1, 1, 1), null_prompt_embeds, prompt_embeds[index])
        noise = torch.randn(latents[index].shape, generator=generator)
        sigmas = sample_sigmas([generator] * len(index), flow_shift=config.flow_shift)
        model_pred = transformer(
            hidden_states=add_noise(latents[index], noise, sigmas),
            timestep=sigmas_to_timesteps(sigmas),
            encoder_hidden_states=encoder_hidden_states,
        ).sample
        loss = F.mse_loss(model_pred, velocity_target(latents[index], noise))
        update(transformer, optimizer, schedule, loss)
        average.step(transformer.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    average.copy_to(transformer.parameters())
    transformer.eval()


def warm_up_and_decay(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a twentieth of the steps, then linear decay to zero."""
    warm_up = max(num_steps // 20, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (num_steps - step) / num_steps)
    )


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    loss: torch.Tensor,
) -> None:
    """One update with the gradient of `loss`, clipped."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(PretrainConfig, argv, description=__doc__)
    start = time.monotonic()
    pretrain(config)
    print(f"{Path(config.output_dir)}: a pipeline, pretrained in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
