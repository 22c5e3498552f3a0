r"""
Samples the same prompts from the same noise, without and with a LoRA. Writes both videos side by side, and prints their
rewards.

    python examples/before_after.py --prompts prompts.txt --lora_path outputs/prfl --reward_model outputs/reward/best \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output_dir outputs/before_after
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from hy_prfl.configs.parser import parse_config
from hy_prfl.evaluation.scoring import score_latents
from hy_prfl.inference.generation import decode_latents
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.video_files import write_video
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_reward_model


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(kw_only=True)
class Config:
    prompts: str = field(metadata={"help": "Text file with one prompt per line."})
    lora_path: str = field(metadata={"help": "Folder of `train_prfl`, a file or a Hub id."})
    reward_model: str = field(metadata={"help": "Reward model: a folder or a Hub id."})
    pretrained_model_name_or_path: str = field(metadata={"help": "Wan text-to-video pipeline."})
    output_dir: str = field(metadata={"help": "Folder for the videos."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise, the same before and after."})
    timesteps: list[int] = field(default_factory=lambda: [201, 400, 600, 800], metadata={"help": "Noise levels."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the chain."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance."})
    height: int = field(default=480, metadata={"help": "Pixels."})
    width: int = field(default=832, metadata={"help": "Pixels."})
    num_frames: int = field(default=81, metadata={"help": "Frames, 4k + 1."})


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    config = parse_config(Config, argv, description=__doc__)
    prompts = [line for line in Path(config.prompts).read_text().splitlines() if line.strip()]
    reward_model = load_reward_model(config.reward_model).to(DEVICE)
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        lora_path=config.lora_path,
        dtype=DTYPE,
        device=DEVICE,
    )
    rewards: dict[str, list[float]] = {"before": [], "after": []}
    for index, prompt in enumerate(prompts):
        # Reward models are trained on 512 tokens, padded with zeros.
        prompt_embeds, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        frames = []
        for version, switch_lora in (("before", pipeline.disable_lora), ("after", pipeline.enable_lora)):
            switch_lora()
            latents = pipeline(
                prompt=prompt,
                height=config.height,
                width=config.width,
                num_frames=config.num_frames,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=torch.Generator().manual_seed(config.seed),
                output_type="latent",
            ).frames
            frames.append(decode_latents(pipeline.vae, latents)[0])
            # The noise is drawn from the row id, so both videos are scored with the same noise.
            logits = score_latents(
                reward_model,
                latents.to(reward_model.dtype),
                Conditioning(prompt_embeds).to(DEVICE, reward_model.dtype),
                config.timesteps,
                row_ids=[str(index)],
            )
            rewards[version].append(logits.sigmoid().mean().item())
        write_video(Path(config.output_dir) / f"{index:03d}.mp4", np.concatenate(frames, axis=2), fps=16)
        print(f"{rewards['before'][-1]:.3f} -> {rewards['after'][-1]:.3f}  {prompt}")
    print(f"{np.mean(rewards['before']):.3f} -> {np.mean(rewards['after']):.3f}  mean of {len(prompts)} prompts")
    return rewards


if __name__ == "__main__":
    main()
