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

# Messages of libraries while diffusers is imported that ask nothing of the user: (logger, start of the message).
# Without torchvision, transformers uses its image processor based on PIL, as intended here, and advises to import that
# one by its name. torchao reports that it lacks kernels of other GPUs, and classes that it has dropped.
_NOISE = (
    ("transformers.utils.import_utils", "`CLIPImageProcessor` requires torchvision"),
    ("torchao", "Failed to load "),
    ("torch.utils._pytree", "<enum 'KernelPreference'>"),
    ("torch.utils._pytree", "<enum 'ScaleCalculationMode'>"),
    ("diffusers.quantizers.torchao.torchao_quantizer", "Unable to import `torchao` Tensor objects"),
)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(start for name, start in _NOISE if name == record.name))


for _name in {name for name, _ in _NOISE}:
    logging.getLogger(_name).addFilter(_is_news)

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
