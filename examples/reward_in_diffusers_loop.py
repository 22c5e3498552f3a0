r"""
Computes the reward while an unmodified diffusers pipeline samples, and stops bad seeds early to save their cost.

    python examples/reward_in_diffusers_loop.py --prompt "A woman waves." --reward_model outputs/reward/best \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num_candidates 8 --output best.mp4

A candidate is stopped after step `--decide_at` if its reward is below that of the best so far. Only the best candidate is
decoded. The pipeline is not changed: a callback reads the latents after each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import WanPipeline

from hy_prfl import WanRewardModel
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.inference.generation import decode_latents
from hy_prfl.inference.video_files import write_video
from hy_prfl.scripts.running import run


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(kw_only=True)
class Config:
    prompt: str = field(metadata={"help": "What the video should show."})
    pretrained_model_name_or_path: str = field(metadata={"help": "Wan text-to-video pipeline."})
    reward_model: str = field(metadata={"help": "Reward model: a folder or a Hub id."})
    output: str = field(default="best.mp4", metadata={"help": "Video to write."})
    num_candidates: int = field(default=8, metadata={"help": "Number of seeds to try."})
    decide_at: int = field(default=20, metadata={"help": "Step after which a candidate must be the best so far."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the chain."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance."})
    height: int = field(default=480, metadata={"help": "Pixels."})
    width: int = field(default=832, metadata={"help": "Pixels."})
    num_frames: int = field(default=81, metadata={"help": "Frames, 4k + 1."})

    def __post_init__(self) -> None:
        check(self.num_candidates >= 1, "num_candidates", self.num_candidates, "at least 1")
        check(
            0 <= self.decide_at < self.num_inference_steps - 1,
            "decide_at",
            self.decide_at,
            "a step before the last one",
        )


class RewardCallback:
    """Scores the latents after every step. Stops the chain if the reward after step `decide_at` is too low."""

    def __init__(self, reward_model: WanRewardModel, decide_at: int, reward_to_beat: float) -> None:
        self.reward_model, self.decide_at, self.reward_to_beat = reward_model, decide_at, reward_to_beat
        self.rewards: dict[int, float] = {}
        self.stopped = False

    @torch.no_grad()
    def __call__(self, pipeline: WanPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # After step i the latents have the noise level of step i + 1. After the last step they are clean and not scored.
        if step + 1 < len(pipeline.scheduler.timesteps):
            next_timestep = pipeline.scheduler.timesteps[step + 1].to(tensors["latents"].device)
            latents = tensors["latents"].to(self.reward_model.dtype)
            prompt_embeds = tensors["prompt_embeds"].to(self.reward_model.dtype)
            logits = self.reward_model(latents, next_timestep.expand(len(latents)), prompt_embeds).logits
            self.rewards[step] = logits.sigmoid().mean().item()
            self.stopped |= step == self.decide_at and self.rewards[step] < self.reward_to_beat
            pipeline._interrupt = self.stopped  # diffusers' own way to end a chain early
        return {}


def main(argv: Sequence[str] | None = None) -> list[RewardCallback]:
    config = parse_config(Config, argv, description=__doc__)
    pipeline = WanPipeline.from_pretrained(
        config.pretrained_model_name_or_path, dtype={"default": DTYPE, "vae": torch.float32}
    ).to(DEVICE)
    reward_model = WanRewardModel.from_pretrained(config.reward_model).to(DEVICE).eval()
    tried: list[RewardCallback] = []
    winner, best_reward = torch.empty(0), 0.0
    for seed in range(config.num_candidates):
        callback = RewardCallback(reward_model, config.decide_at, best_reward)
        latents = pipeline(
            prompt=config.prompt,
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            output_type="latent",
        ).frames
        tried.append(callback)
        print(
            f"seed {seed}:", *(f"{reward:.2f}" for reward in callback.rewards.values()), "stopped" * callback.stopped
        )
        if not callback.stopped:
            winner, best_reward = latents, callback.rewards[config.decide_at]
    write_video(config.output, decode_latents(pipeline.vae, winner)[0], fps=16)
    return tried


if __name__ == "__main__":
    run(main)
