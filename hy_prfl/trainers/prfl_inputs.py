"""Where the options of PRFL say that its models and datasets are. What can be checked is checked before weights are read."""

from functools import partial
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from ..configs.base import check
from ..configs.prfl import PRFLTrainingConfig
from ..data.dataset import load_latent_dataset
from ..data.encoding import vae_fingerprint
from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..models.experts import read_experts
from ..models.loading import Deferred, load_reward_model, load_transformer
from ..models.reward_model import WanRewardModel, check_latents_fit
from ..runtime.sharding import split_frozen
from .run import Run


AnyTransformer: TypeAlias = WanTransformer3DModel | Deferred[WanTransformer3DModel]


def generator_dtype(config: PRFLTrainingConfig, run: Run) -> torch.dtype:
    """Type to load the generator in: as what trains if all of it does, else, with an adapter, as what does not."""
    return run.trained_dtype if config.lora_rank is None else run.weight_dtype


def check_offload(run: Run) -> None:
    """ZeRO-3 hands over to host memory only the gradients of the last backward pass's parameters."""
    plugin = run.accelerator.state.deepspeed_plugin
    if plugin is not None:
        place = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device")
        check(place in (None, "none"), "expert", "both", "one expert with an offloaded optimizer")


def open_datasets(config: PRFLTrainingConfig) -> dict[str, Dataset]:
    """Datasets that the options name, by the name of the option."""
    names = ("train_dataset", "prompt_dataset", "validation_dataset")
    paths = {name: getattr(config, name) for name in names}
    return {name: load_latent_dataset(path) for name, path in paths.items() if path is not None}


def open_models(config: PRFLTrainingConfig, run: Run) -> dict[str, Any]:
    """
    Models that the options name, as arguments of the trainer; the large ones are deferred.

    Raises:
        ValueError: If a dataset or the reward model is of another VAE than the pipeline's.
    """
    path, revision, device = config.pretrained_model_name_or_path, config.revision, run.accelerator.device
    experts = read_experts(path, config.expert, revision=revision)
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", revision=revision, variant=config.variant)
    reward_config = WanRewardModel.load_own_config(config.reward_model)
    check_latents_fit(reward_config, vae_fingerprint=vae_fingerprint(vae), source=path)
    reward_model = Deferred(
        {**reward_config, "vae_fingerprint": vae_fingerprint(vae)},
        partial(
            load_reward_model,
            config.reward_model,
            dtype=run.weight_dtype,
            split=partial(split_frozen, device=device) if config.shard_reward_model else None,
        ),
    )

    def transformer(expert: ExpertName, **how: Any) -> Deferred[WanTransformer3DModel]:
        subfolder = EXPERT_FOLDERS[expert]
        return Deferred(
            WanTransformer3DModel.load_config(path, subfolder=subfolder, revision=revision),
            partial(load_transformer, path, revision=revision, variant=config.variant, subfolder=subfolder, **how),
        )

    dtype = generator_dtype(config, run)
    models: dict[str, Any] = {
        "transformer": {name: transformer(name, dtype=dtype, split=run.split) for name in experts.trained},
        "reward_model": reward_model,
        "vae": vae if config.validation_videos else None,
    }
    frozen = experts.frozen(
        rolls_out=config.update_schedule != "flow_matching", samples=config.validation_dataset is not None
    )
    if frozen is not None:
        split = partial(split_frozen, device=device) if config.shard_frozen_expert else None
        models["frozen_expert"] = transformer(frozen, dtype=run.weight_dtype, split=split, keep_in_fp32=True)
    return models
