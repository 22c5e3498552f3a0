"""How PRFL saves and reads the generator: whole transformers or adapters, by expert."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..configs.prfl import PRFLTrainingConfig
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.lora_metadata import lora_metadata
from ..formats.model_files import read_lora, save_lora, save_pretrained
from ..models.experts import PairWeights
from ..models.loading import WeightFiles
from ..runtime.atomic_writes import replace_folder, temporary_folder, temporary_name
from ..runtime.sharding import full_state_dict


logger = get_logger(__name__)


def adapter_metadata(
    config: PRFLTrainingConfig, *, step: int, run: str, base_on_hub: bool, expert: ExpertName | None
) -> dict[str, str]:
    """Header of an adapter's file, see [`~hy_prfl.formats.lora_metadata.lora_metadata`]."""
    return lora_metadata(
        base_model=config.pretrained_model_name_or_path,
        base_on_hub=base_on_hub,
        reward_model=config.reward_model,
        reward_models=config.reward_models,
        step=step,
        run=run,
        config=dataclasses.asdict(config),
        expert=expert,
        base_quantization=config.base_quantization,
    )


def save_transformer(
    accelerator: Accelerator,
    transformer: Any,
    directory: Path,
    expert: ExpertName,
    config: PRFLTrainingConfig,
    metadata: Mapping[str, str],
) -> None:
    """Write the trained weights of one transformer; `metadata` is the header of an adapter. A collective."""
    is_lora = config.lora_rank is not None
    state_dict = full_state_dict(accelerator, transformer, trainable_only=is_lora)
    if accelerator.is_main_process and is_lora:
        save_lora(transformer, state_dict, directory / LORA_FILES[expert], metadata)
    elif accelerator.is_main_process:
        save_pretrained(transformer, state_dict, directory / EXPERT_FOLDERS[expert])


def save_best(
    accelerator: Accelerator, target: Path, save_model: Callable[[Path], None], report: Mapping[str, float]
) -> None:
    """Replace the folder of the best model by the current model and its metrics. A collective."""
    temporary = temporary_name(target)
    if accelerator.is_main_process:
        temporary_folder(target)
        temporary.mkdir(parents=True)
    save_model(temporary)
    if accelerator.is_main_process:
        (temporary / "metrics.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        replace_folder(temporary, target)
    logger.info("Best held-out reward so far, %.4f: %s.", report["monitor_reward"], target)


def read_transformers(
    directory: Path, trained: Sequence[ExpertName], config: PRFLTrainingConfig
) -> Mapping[str, torch.Tensor]:
    """Read what [`save_transformer`] wrote for these experts, by the names of the trained parameters."""
    weights: dict[ExpertName, Mapping[str, torch.Tensor]] = {
        expert: WeightFiles(directory, subfolder=EXPERT_FOLDERS[expert])
        if config.lora_rank is None
        else read_lora(directory / LORA_FILES[expert])
        for expert in trained
    }
    return PairWeights(weights) if len(weights) > 1 else weights[trained[0]]
