"""Loads the parts of a diffusers Wan pipeline folder; the place that knows its subfolders."""

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

from .reward_model import WanRewardModel


def load_transformer(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    subfolder: str = "transformer",
) -> WanTransformer3DModel:
    """Load the generator of a Wan pipeline."""
    return WanTransformer3DModel.from_pretrained(
        pretrained_model_name_or_path, subfolder=subfolder, revision=revision, variant=variant, dtype=dtype
    )


def load_scheduler(
    pretrained_model_name_or_path: str, *, revision: str | None = None, flow_shift: float | None = None
) -> UniPCMultistepScheduler:
    """
    Load the sampler of a Wan pipeline, so that a rollout walks the grid that inference walks.

    Args:
        flow_shift (`float`, *optional*):
            Replaces the pipeline's own shift (3 for 480P, 5 for 720P in Wan's recipes).

    Raises:
        ValueError: If the pipeline's scheduler is not UniPC on flow sigmas.
    """
    config = UniPCMultistepScheduler.load_config(
        pretrained_model_name_or_path, subfolder="scheduler", revision=revision
    )
    name = config.get("_class_name")
    if name != "UniPCMultistepScheduler" or not config.get("use_flow_sigmas"):
        raise ValueError(
            f"{pretrained_model_name_or_path}: the scheduler must be a UniPCMultistepScheduler with "
            f"`use_flow_sigmas: true`, got {name} with `use_flow_sigmas: {config.get('use_flow_sigmas')}`."
        )
    overrides = {} if flow_shift is None else {"flow_shift": flow_shift}
    return UniPCMultistepScheduler.from_config(config, **overrides)


def load_reward_model(
    pretrained_model_name_or_path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> WanRewardModel:
    """Load a reward model, frozen and in evaluation mode: its weights take no gradient, its input may."""
    reward_model = WanRewardModel.from_pretrained(pretrained_model_name_or_path, revision=revision, dtype=dtype)
    return reward_model.requires_grad_(False).eval()
