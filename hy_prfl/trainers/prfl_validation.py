"""The validation of PRFL: held-out prompts sampled and scored as the options say."""

from datasets import Dataset
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

from ..configs.prfl import PRFLTrainingConfig
from ..evaluation.sample_evaluator import SampleEvaluator
from ..formats.checkpoints import VALIDATION_FOLDER
from ..rollout.reward_feedback import RewardFeedback
from .run import Run


def build_evaluator(
    config: PRFLTrainingConfig,
    run: Run,
    validation: Dataset | None,
    *,
    reward: RewardFeedback,
    scheduler: UniPCMultistepScheduler,
    vae: AutoencoderKLWan | None,
) -> SampleEvaluator | None:
    """The evaluator that samples and scores held-out prompts; None without a validation dataset."""
    if validation is None:
        return None
    if run.context_parallel is not None and not run.context_parallel.is_first_rank:
        # All ranks of a group have the same samples, and one of them writes the videos.
        vae = None
    if vae is not None:
        vae.to(run.accelerator.device).requires_grad_(False).eval()
    return SampleEvaluator(
        validation.select(range(min(config.num_validation_samples, len(validation)))),
        reward_models=dict(zip(reward.names, reward.models, strict=True)),
        combination=reward.combination,
        in_use=reward.in_use,
        scheduler=scheduler,
        vae=vae,
        output_dir=run.output_dir / VALIDATION_FOLDER,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        timesteps=config.validation_timesteps,
        batch_size=config.train_batch_size,
        fps=config.validation_fps,
        seed=config.validation_seed,
        dtype=run.weight_dtype,
        num_replicas=run.num_replicas,
        replica=run.replica,
        vae_tiling=config.vae_tiling,
    )
