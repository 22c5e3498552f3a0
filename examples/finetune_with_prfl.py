r"""
Fine-tunes a generator with PRFL from Python, and loads the result into an unmodified diffusers pipeline.

    python examples/finetune_with_prfl.py --train_dataset data/train --reward_model outputs/reward/best \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output_dir outputs/prfl

Run under `accelerate launch` to use several GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import WanPipeline

from hy_prfl import PRFLTrainer, PRFLTrainingConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.models.loading import load_reward_model, load_transformer


@dataclass(kw_only=True)
class Config:
    pretrained_model_name_or_path: str = field(metadata={"help": "Wan pipeline to tune."})
    train_dataset: str = field(metadata={"help": "Clips, encoded by `hy-prfl preprocess`."})
    reward_model: str = field(metadata={"help": "Reward model: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder of the run."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the denoising chain in a rollout."})
    max_train_steps: int = field(default=200, metadata={"help": "Training steps, of two updates each."})


class PrintingTrainer(PRFLTrainer):
    """A subclass changes what a trainer does. This one only prints more."""

    def train_step(self) -> dict[str, torch.Tensor]:
        metrics = super().train_step()
        if self.accelerator.is_main_process:
            print(f"step {self.global_step + 1}: reward {metrics['reward']:.3f}")
        return metrics


def main(argv: Sequence[str] | None = None) -> WanPipeline:
    config = parse_config(Config, argv, description=__doc__)
    options = PRFLTrainingConfig(
        output_dir=config.output_dir,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        train_dataset=config.train_dataset,
        reward_model=config.reward_model,
        lora_rank=config.lora_rank,
        learning_rate=1e-4,
        update_schedule="alternate",
        reward_loss="logsigmoid",
        num_inference_steps=config.num_inference_steps,
        max_train_steps=config.max_train_steps,
        gradient_checkpointing=True,
        checkpointing_steps=50,
        checkpoints_total_limit=2,
        report_to=["none"],
    )
    # `PrintingTrainer.from_config(options)` does the same. Pass your own models and datasets here to use them instead.
    run = PrintingTrainer.set_up_run(options)
    trainer = PrintingTrainer(
        options,
        transformer=load_transformer(config.pretrained_model_name_or_path, dtype=run.weight_dtype, shard=run.shard),
        reward_model=load_reward_model(config.reward_model, dtype=run.weight_dtype),
        train_dataset=load_latent_dataset(config.train_dataset),
        run=run,
    )
    trainer.train()

    pipeline = WanPipeline.from_pretrained(config.pretrained_model_name_or_path, dtype=torch.bfloat16)
    pipeline.load_lora_weights(config.output_dir, weight_name="pytorch_lora_weights.safetensors")
    return pipeline


if __name__ == "__main__":
    main()
