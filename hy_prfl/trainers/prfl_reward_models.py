"""Loads the reward models of a PRFL run, those of its reward and those of its monitor."""

from collections.abc import Sequence

from accelerate.logging import get_logger
from torch import nn

from ..configs.prfl import PRFLTrainingConfig
from ..models.loading import Deferred, loaded
from ..models.reward_model import WanRewardModel
from ..models.shared_backbone import group_by_backbone, have_same_backbone, share_backbone
from ..rollout.reward_feedback import InUse, always_in_use
from ..runtime.host_weights import HostWeights
from .run import Run


logger = get_logger(__name__)


def name_models(tasks: Sequence[str]) -> list[str]:
    """Names of reward models: their tasks, or if two share one, their positions in `reward_models`, from 0 on."""
    return list(tasks) if len(set(tasks)) == len(tasks) else [str(index) for index in range(len(tasks))]


def load_reward_models(
    models: Sequence[WanRewardModel | Deferred[WanRewardModel]],
    config: PRFLTrainingConfig,
    run: Run,
    *,
    num_checkpointed: int | None,
) -> tuple[list[nn.Module], InUse]:
    """
    Load reward models, on the device or, with `offload_reward_model`, in host memory.

    Models with the same blocks share them, see [`~hy_prfl.models.shared_backbone.share_backbone`]. Sharded ones do not:
    `fully_shard` gathers the weights of a model for this model's own pass.

    Args:
        num_checkpointed (`int`, *optional*):
            How many of a model's blocks use activation checkpointing; all if None.

    Returns:
        The frozen models, and a function that returns a context in which a model is on the device, and with it those
        that share its blocks.
    """
    found: list[WanRewardModel] = []
    for each in models:
        model = loaded(each).requires_grad_(False).eval()
        same = None
        if not config.shard_reward_model:
            same = next((other for other in found if have_same_backbone(other, model)), None)
        if same is not None:
            share_backbone(model, same)
        if not config.offload_reward_model:
            model.to(run.accelerator.device)
        if same is None:
            run.set_up_blocks(model, num_checkpointed=num_checkpointed)
        found.append(model)
    groups = [[found[place] for place in places] for places in group_by_backbone(found)]
    if len(groups) < len(found):
        logger.info(
            "%d reward models have %d backbones: those with the same blocks share them.", len(found), len(groups)
        )
    elif config.shard_reward_model and len(found) > 1:
        logger.info("Sharded reward models are called one by one, also where their blocks are the same.")
    if not config.offload_reward_model:
        return list(found), always_in_use
    hosts: dict[nn.Module, HostWeights] = {}
    for group in groups:
        weights = HostWeights(nn.ModuleList(group), run.accelerator.device)
        hosts |= dict.fromkeys(group, weights)
    return list(found), lambda model: hosts[model].on_device()
