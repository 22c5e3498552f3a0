"""Opens the models and datasets that the options of PRFL name. All checks come before any weights are read."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from ..compatibility import REWARD_LATENTS, check_fits_generator, check_same_vae, check_vae
from ..configs.base import check
from ..configs.prfl import PRFLTrainingConfig
from ..data.dataset import load_latent_dataset, single_value
from ..data.encoding import vae_fingerprint
from ..flow_matching import noise_levels
from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..models.experts import Experts, choose_experts
from ..models.loading import (
    Deferred,
    empty_transformer,
    load_reward_model,
    load_transformer,
    loaded,
    read_reward_config,
    start_of,
)
from ..models.reward_model import WanRewardModel
from ..models.starting_points import StartingPoint, check_starts_adapter, read_starting_point, start_adapter
from ..models.trainable import select_trainable
from ..rollout.gradient_steps import mean_foreseen_gain
from ..runtime.sharding import shard_frozen
from .base import check_dataset
from .run import Run


logger = get_logger(__name__)

AnyTransformer: TypeAlias = WanTransformer3DModel | Deferred[WanTransformer3DModel]
AnyRewardModel: TypeAlias = WanRewardModel | Deferred[WanRewardModel]


def generator_dtype(config: PRFLTrainingConfig, run: Run) -> torch.dtype:
    """Type to load the generator in: that of trained weights, or with an adapter that of frozen weights."""
    return run.trained_dtype if config.lora_rank is None else run.weight_dtype


def check_offload(run: Run) -> None:
    """
    Refuse to train two experts with an offloaded optimizer.

    ZeRO-3 moves only the gradients of an update's last backward pass to host memory, and it reaches one expert.
    """
    plugin = run.accelerator.state.deepspeed_plugin
    if plugin is not None:
        place = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device")
        check(place in (None, "none"), "expert", "both", "one expert with an offloaded optimizer")


def check_sharding(config: PRFLTrainingConfig) -> None:
    """Refuse to shard frozen weights in a single process, which has no process group."""
    for name in ("shard_reward_model", "shard_frozen_expert"):
        value = getattr(config, name)
        check(not value or torch.distributed.is_initialized(), name, value, "false with a single process")


def open_datasets(config: PRFLTrainingConfig) -> dict[str, Dataset]:
    """Load the datasets that the options name, by the name of the option."""
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
    experts = choose_experts(run.pipeline, config.expert)
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", revision=revision, variant=config.variant)
    fingerprint = vae_fingerprint(vae)

    def reward_model(option: str, source: str, of: str) -> Deferred[WanRewardModel]:
        reward_config = read_reward_config(source, option=option)
        check_same_vae(fingerprint, reward_config["vae_fingerprint"], source=path, of=of)
        load = partial(
            load_reward_model,
            source,
            dtype=run.weight_dtype,
            shard=partial(shard_frozen, device=device) if config.shard_reward_model else None,
            quantizer=run.quantizer("reward_model_quantization"),
        )
        return Deferred({**reward_config, "vae_fingerprint": fingerprint}, load)

    frozen = experts.frozen(
        rolls_out=config.update_schedule != "flow_matching", samples=config.validation_dataset is not None
    )
    starts = {expert: _read_start(config, run, expert, experts, frozen) for expert in EXPERT_FOLDERS}

    def transformer(expert: ExpertName, **how: Any) -> Deferred[WanTransformer3DModel]:
        where: dict[str, Any] = {"subfolder": EXPERT_FOLDERS[expert], "revision": revision}
        load = partial(load_transformer, path, variant=config.variant, start=starts[expert], **where, **how)
        return Deferred(WanTransformer3DModel.load_config(path, **where), load, starts[expert])

    dtype = generator_dtype(config, run)
    models: dict[str, Any] = {
        "transformer": {
            name: transformer(name, dtype=dtype, shard=run.shard, quantizer=run.quantizer("base_quantization"))
            for name in experts.trained
        },
        "reward_model": [
            reward_model("reward_model", source, REWARD_LATENTS)
            if config.reward_models is None
            else reward_model("reward_models", source, f"{REWARD_LATENTS}, {source},")
            for source in config.reward_sources
        ],
        "monitor_reward_models": [
            reward_model(
                "monitor_reward_models",
                source,
                f"the latents that the monitor's reward model '{source}' was trained on",
            )
            for source in config.monitor_reward_models
        ],
        "vae": vae if config.validation_videos else None,
    }
    if frozen is not None:
        shard = partial(shard_frozen, device=device) if config.shard_frozen_expert else None
        quantizer = run.quantizer("frozen_expert_quantization")
        models["frozen_expert"] = transformer(
            frozen, dtype=run.weight_dtype, shard=shard, quantizer=quantizer, keep_in_fp32=True
        )
    return models


def _read_start(
    config: PRFLTrainingConfig, run: Run, expert: ExpertName, experts: Experts, frozen: ExpertName | None
) -> StartingPoint:
    """The weights that replace one of the pipeline's transformers, as the options say; refuses what does not fit."""
    trains = expert in experts.trained
    suffix = "" if expert == "high_noise" else "_2"
    paths: dict[str, str | None] = {kind: getattr(config, f"{kind}{suffix}_path") for kind in ("transformer", "lora")}
    if not any(paths.values()):
        return StartingPoint()
    for kind, path in paths.items():
        reason = f"left out, the run does not use the {expert} expert"
        check(trains or expert == frozen or path is None, f"{kind}{suffix}_path", path, reason)
    pipeline = config.pretrained_model_name_or_path
    base = empty_transformer(pipeline, revision=config.revision, subfolder=EXPERT_FOLDERS[expert])
    lora_start = config.lora_start if trains else "merge"
    start = read_starting_point(
        paths["transformer"], paths["lora"], lora_start, base=base, expert=expert, suffix=suffix
    )
    if trains:
        with torch.device("meta"):
            select_trainable(base, config, dtype=run.trained_dtype)
        check_starts_adapter(base, start)
        if config.lora_rank is not None and not start.is_pipelines_own:
            logger.warning(
                "The trained LoRA will fit the transformer that the run starts from, not that of %s. Generate with the "
                "former; `hy-prfl convert --transformer ... --merge_lora ...` writes one with a merged LoRA.",
                pipeline,
            )
    return start


def by_expert(
    experts: Experts,
    transformer: AnyTransformer | Mapping[ExpertName, AnyTransformer],
    frozen_expert: AnyTransformer | None,
    *,
    rolls_out: bool,
    samples: bool,
) -> dict[ExpertName, AnyTransformer]:
    """
    The given transformers by the names of their experts, the trained ones first.

    Args:
        rolls_out, samples (`bool`):
            See [`~hy_prfl.models.experts.Experts.frozen`].

    Raises:
        ValueError: If one is missing or not needed.
    """
    trained = experts.trained
    given = dict(transformer) if isinstance(transformer, Mapping) else {trained[0]: transformer}
    check(set(given) == set(trained), "transformer", sorted(given), f"one for each of {sorted(trained)}")
    needed = experts.frozen(rolls_out=rolls_out, samples=samples)
    found = "given" if frozen_expert is not None else "left out"
    requirement = "left out, no chain needs it" if needed is None else f"the expert {needed}, chains walk through it"
    check((frozen_expert is None) == (needed is None), "frozen_expert", found, requirement)
    ordered = {expert: given[expert] for expert in trained}
    return ordered if needed is None or frozen_expert is None else {**ordered, needed: frozen_expert}


def load_trained(transformer: AnyTransformer, config: PRFLTrainingConfig, run: Run) -> WanTransformer3DModel:
    """Load a transformer to train, in full or by an adapter, and set up its blocks."""
    model = loaded(transformer)
    select_trainable(model, config, dtype=run.trained_dtype)
    start_adapter(model, start_of(transformer))
    run.set_up_blocks(model, num_checkpointed=config.gradient_checkpointing_blocks)
    return model


def load_frozen(transformer: AnyTransformer, run: Run) -> WanTransformer3DModel:
    """Load an expert that does not train to the device, and set up its blocks."""
    model = loaded(transformer).requires_grad_(False).eval().to(run.accelerator.device)
    run.set_up_blocks(model, num_checkpointed=0)
    return model


def check_reward_models(
    config: PRFLTrainingConfig,
    run: Run,
    reward_configs: Sequence[Mapping[str, Any]],
    generator_configs: Sequence[Mapping[str, Any]],
    datasets: Mapping[str, Dataset],
) -> None:
    """
    Refuse reward models that cannot score the generator's latents, before weights are read.

    Args:
        reward_configs (`Sequence[Mapping[str, Any]]`):
            Their configurations, one for each of the options' `reward_sources`.
        generator_configs (`Sequence[Mapping[str, Any]]`):
            Configurations of the transformers in training.
        datasets (`Mapping[str, Dataset]`):
            Datasets by their names.

    Raises:
        ValueError: If something does not fit; names both.
    """
    sources, is_one = config.reward_sources, config.reward_models is None
    found, option = len(reward_configs), "reward_model" if is_one else "reward_models"
    check(found == len(sources), option, sources, f"as many names as there are models, {found}")
    tasks = {source: each["task"] for source, each in zip(sources, reward_configs, strict=True)}
    requirement = f"0 for reward models of several tasks, {tasks}, which do not answer the same question"
    agrees = config.reward_disagreement == 0 or len(set(tasks.values())) == 1
    check(agrees, "reward_disagreement", config.reward_disagreement, requirement)
    fingerprint = None
    for source, reward_config in zip(sources, reward_configs, strict=True):
        name = "The reward model" if is_one else f"The reward model {source}"
        for generator_config in generator_configs:
            check_fits_generator(reward_config, generator_config, allow_other_base=config.allow_other_base, name=name)
        own = reward_config["vae_fingerprint"]
        check_same_vae(own, fingerprint, source=source, of="the other reward models")
        fingerprint = fingerprint or own
    for dataset_name, dataset in datasets.items():
        fingerprint = fingerprint or single_value(dataset, "vae_fingerprint", dataset_name)
        check_vae(dataset, dataset_name, fingerprint)
        for reward_config in reward_configs:
            check_dataset(run, dataset, dataset_name, reward_config)


def find_step_range(
    config: PRFLTrainingConfig, experts: Experts, scheduler: UniPCMultistepScheduler
) -> tuple[int, int]:
    """First and last step of a chain that may take gradient; both belong to an expert in training."""
    if config.update_schedule == "flow_matching":
        return (0, 0)
    scheduler.set_timesteps(config.num_inference_steps)
    return experts.gradient_steps(
        scheduler.timesteps.tolist(), config.step_range, config.num_gradient_steps, config.num_chained_steps
    )


def find_mean_foreseen_gain(
    config: PRFLTrainingConfig, scheduler: UniPCMultistepScheduler, step_range: tuple[int, int]
) -> float:
    """[`~hy_prfl.rollout.gradient_steps.mean_foreseen_gain`] over the steps that may take gradient; 1 if none do."""
    if config.update_schedule == "flow_matching":
        return 1.0
    first, last = step_range
    low, high = config.foreseen_levels
    return mean_foreseen_gain(scheduler.sigmas[first : last + 2], (low, high))


def find_high_noise_probability(config: PRFLTrainingConfig, experts: Experts) -> float:
    """
    Probability that the noise level drawn for a clip belongs to the high-noise expert.

    Raises:
        ValueError: If the only expert in training would hardly ever be drawn.
    """
    probability = noise_levels(config).probability_from(experts.boundary)
    shares = {"high_noise": probability, "low_noise": 1 - probability}
    if config.update_schedule != "reward" and len(experts.trained) == 1:
        share = shares[experts.trained[0]]
        levels = f"one that draws more than 1 in 10,000 noise levels for `expert` {config.expert}"
        check(share > 1e-4, "weighting_scheme", f"{config.weighting_scheme} with {share:.2%}", levels)
    return probability
