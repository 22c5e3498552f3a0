"""Latent process rewards for video generators: PAVRM reward models and PRFL post-training."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .configs.prfl import PRFLTrainingConfig
    from .configs.reward import RewardTrainingConfig
    from .models.reward_model import WanRewardModel, WanRewardModelOutput
    from .trainers.prfl_trainer import PRFLTrainer
    from .trainers.reward_trainer import RewardTrainer

# diffusers imports `CLIPImageProcessor`, and without torchvision transformers puts the class that works with PIL in its
# place, as is right here, and advises every user to import that one instead.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: not record.getMessage().startswith("`CLIPImageProcessor` requires torchvision")
)

# Imported when first used, so that `import hy_prfl` and `hy-prfl --help` do not wait for torch.
_HOMES = {
    "PRFLTrainer": ".trainers.prfl_trainer",
    "PRFLTrainingConfig": ".configs.prfl",
    "RewardTrainer": ".trainers.reward_trainer",
    "RewardTrainingConfig": ".configs.reward",
    "WanRewardModel": ".models.reward_model",
    "WanRewardModelOutput": ".models.reward_model",
}

__all__ = [
    "PRFLTrainer",
    "PRFLTrainingConfig",
    "RewardTrainer",
    "RewardTrainingConfig",
    "WanRewardModel",
    "WanRewardModelOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hy_prfl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
