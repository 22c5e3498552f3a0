"""
RGB ReFL, the baseline in table 4 of the paper (equation 3): a reward on decoded frames.

It is only a baseline. It denoises to a late step and takes that step with gradient. It predicts the clean latents
there, decodes them with Wan's VAE and scores the frames with an image reward. Generator, data, optimizer,
flow-matching update and loss are those of PRFL, and so are the two backward passes, first to the latents and then
through the generator. [`RGBReFLTrainer`] replaces only the rollout and the score.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hy_prfl.configs.base import check
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.flow_matching import sample_noise
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.rollout.gradient_steps import GradientStep, surrogate
from hy_prfl.rollout.reward_feedback import RewardFeedback
from hy_prfl.rollout.sampling import predict_velocity
from hy_prfl.runtime.attention import use_attention_backend
from hy_prfl.trainers.prfl_trainer import REWARD_NOISE, PRFLTrainer


Decoded = Literal["first", "all"]
# Every 8th frame is scored: 2 of 16 per second, as in VideoAlign.
FRAME_STRIDE = 8
# Scale of the cosine. Trained CLIP models have about 100, which would saturate the loss of an untrained one.
LOGIT_SCALE = 10.0
# CLIP's own normalisation of images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PixelReward(nn.Module):
    """
    Decodes latents and scores the frames: similarity of frames and text in CLIP's space, as in PickScore.

    The embedding of the text is a constant: the text tower would run only once per prompt.

    Args:
        vae (`AutoencoderKLWan`):
            VAE that decodes the latents.
        image_reward (`Mapping`):
            Arguments of `CLIPVisionConfig`. The weights are random.
        decodes (`"first"` or `"all"`):
            Decode the first latent frame, which is one video frame, or all latent frames.
        checkpointing (`bool`, defaults to `False`):
            Use activation checkpointing, like `gradient_checkpointing` for the transformers.
    """

    def __init__(
        self, vae: AutoencoderKLWan, image_reward: Mapping[str, Any], *, decodes: Decoded, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.vae = vae
        # Only the decoder is needed.
        self.vae.encoder = self.vae.quant_conv = nn.Identity()
        self.network = CLIPVisionModelWithProjection(CLIPVisionConfig(**image_reward))
        self.decodes, self.checkpointing = decodes, checkpointing
        self.register_buffer("text_embeds", torch.randn(self.network.config.projection_dim))
        # Per channel: CLIP's normalisation of images, and the VAE's normalisation of latents.
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(MEAN).view(shape))
        self.register_buffer("std", torch.tensor(STD).view(shape))
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean).view(*shape, 1))
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std).view(*shape, 1))
        self.requires_grad_(False)
        if checkpointing:
            with warnings.catch_warnings():
                # transformers 5.23 warns about the argument, but 5.0 does not have its new name.
                warnings.simplefilter("ignore", FutureWarning)
                self.network.gradient_checkpointing_enable({"use_reentrant": False})
            # transformers uses checkpointing only in training mode. There is no dropout.
            self.network.train()

    def forward(self, latents: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size,)` of clean latents `(batch_size, num_channels, num_frames, height, width)`."""
        latents = latents * self.latents_std + self.latents_mean
        decode = decode_first_frame if self.decodes == "first" else decode_all_frames
        frames = decode(self.vae, latents.to(self.vae.dtype), checkpointing=self.checkpointing)[:, :, ::FRAME_STRIDE]
        batch_size, num_frames = frames.shape[0], frames.shape[2]
        images = frames.transpose(1, 2).flatten(0, 1).float()
        size = self.network.config.image_size
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        images = (images / 2 + 0.5 - self.mean) / self.std
        embeds = self.network(images.to(self.network.dtype)).image_embeds
        logits = LOGIT_SCALE * F.cosine_similarity(embeds.float(), self.text_embeds.float()[None], dim=-1)
        return logits.view(batch_size, num_frames).mean(dim=1)


def decode_first_frame(vae: AutoencoderKLWan, latents: torch.Tensor, *, checkpointing: bool) -> torch.Tensor:
    """
    Same result as `vae.decode(latents[:, :, :1]).sample`, optionally with activation checkpointing.

    diffusers' VAE does not support checkpointing. With one frame there is no state between frames, so the layers can
    be called one by one.
    """
    run: Callable[..., torch.Tensor] = partial(checkpoint, use_reentrant=False) if checkpointing else _call
    decoder = vae.decoder
    hidden_states = decoder.conv_in(vae.post_quant_conv(latents[:, :, :1]))
    hidden_states = run(decoder.mid_block, hidden_states)
    for block in decoder.up_blocks:
        for layer in (*block.resnets, *(block.upsamplers or ())):
            hidden_states = run(layer, hidden_states)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden_states))).clamp(-1, 1)


def decode_all_frames(vae: AutoencoderKLWan, latents: torch.Tensor, *, checkpointing: bool) -> torch.Tensor:
    """
    Same result as `vae.decode(latents).sample`, optionally with activation checkpointing of each latent frame.

    The VAE decodes frame by frame and caches the last inputs of its convolutions. Here this cache is an argument and a
    result, so that a frame can be decoded again.
    """

    def decode_frame(frame: torch.Tensor, *cache: Any) -> tuple[Any, ...]:
        new_cache = list(cache)
        is_first = cache[0] is None
        sample = vae.decoder(frame, feat_cache=new_cache, feat_idx=[0], first_chunk=is_first)
        return sample, *new_cache

    run = partial(checkpoint, use_reentrant=False) if checkpointing else _call
    vae.clear_cache()
    cache: tuple[Any, ...] = tuple(vae._feat_map)
    samples = []
    for frame in vae.post_quant_conv(latents).split(1, dim=2):
        sample, *rest = run(decode_frame, frame, *cache)
        samples.append(sample)
        cache = tuple(rest)
    return torch.cat(samples, dim=2).clamp(-1, 1)


class FramesFeedback(RewardFeedback):
    """The reward of decoded frames in place of one of latents."""

    def score(
        self, model: Any, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Logits `(batch_size,)` of the frames of clean latents."""
        with self.autocast():
            return model(latents, conditioning.prompt_embeds)


class RGBReFLTrainer(PRFLTrainer):
    """
    PRFL's trainer with another rollout and another reward.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run. Its reward model is loaded for the checks and not used.
        build_reward (`Callable`):
            Makes the reward from the pipeline's VAE. The reward is called with clean latents and prompt embeddings.
        parts:
            Models and datasets, as for [`PRFLTrainer`].
    """

    def __init__(
        self, config: PRFLTrainingConfig, *, build_reward: Callable[[AutoencoderKLWan], nn.Module], **parts: Any
    ) -> None:
        options = {"num_gradient_steps": 1, "rerun_gradient_step": False, "num_chained_steps": 1, "reward_at": "next"}
        options |= {"rollout_interval": 1, "rollout_cache_interval": 1, "anchor_scale": 0.0}
        for name, only in options.items():
            value = getattr(config, name)
            check(value == only, name, value, "left out for RGB ReFL")
        # The clean latents are predicted in one step, so there is no step width to divide by.
        super().__init__(replace(config, divide_by_step_width=False), **parts)
        vae = AutoencoderKLWan.from_pretrained(config.pretrained_model_name_or_path, subfolder="vae")
        torch.manual_seed(config.seed)
        reward_model = build_reward(vae).to(self.accelerator.device, self.weight_dtype)
        # `PRFLTrainer` has loaded the latent reward model; this frees it.
        self.reward = FramesFeedback(self.config, [reward_model], names=["frames"], autocast=self.accelerator.autocast)

    def roll_out(
        self, latents_shape: Sequence[int], conditioning: Conditioning, micro_step: int
    ) -> Iterator[GradientStep]:
        """Steps without gradient, then one forward with gradient that predicts the clean latents."""
        config, scheduler = self.config, self.scheduler
        (step_index,) = self.draw_step_indices(micro_step)
        batch_size = len(conditioning.prompt_embeds)
        latents = sample_noise(latents_shape, self.generators(REWARD_NOISE, micro_step, batch_size))
        latents = latents.to(self.accelerator.device)
        scheduler.set_timesteps(config.num_inference_steps, device=latents.device)
        scheduler.set_begin_index(0)
        with torch.no_grad(), use_attention_backend(self.wrapped, config.rollout_attention_backend):
            for timestep in scheduler.timesteps[:step_index]:
                velocity = predict_velocity(self.wrapped, latents, timestep, conditioning)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        timestep = scheduler.timesteps[step_index]
        velocity = predict_velocity(self.wrapped, latents, timestep, conditioning)
        sigma = scheduler.sigmas[step_index]
        clean = latents - sigma * velocity
        yield GradientStep(
            clean.detach(),
            timesteps=timestep.expand(batch_size),
            gain=sigma,
            velocity=velocity.detach(),
            surrogates=partial(surrogate, clean, velocity),
        )


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
