"""
Loads the stock diffusers Wan pipelines: with a tuned transformer or LoRAs, with another solver or shift, or for several
processes that make a video together.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from torch import nn

from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.pipeline_info import PipelineInfo
from ..formats.sources import reading
from ..formats.weight_files import check_finite
from ..runtime.attention import set_attention_backend
from ..runtime.context_parallel import ContextParallelGroup
from ..runtime.sharding import shard_frozen_model
from .pipeline_loras import (
    LORA_OPTIONS,
    add_loras,
    as_list,
    check_lora_fits,
    check_options_fit,
    read_lora,
    warn_of_unnamed_experts,
)
from .schedulers import SampleSolver, build_scheduler, load_own_scheduler
from .tuned_transformers import TRANSFORMER_OPTIONS, load_tuned_transformer


CPUOffload = Literal["none", "model", "sequential"]
StepCacheKind = Literal["none", "first_block", "taylorseer", "sea"]
ShardedModel = Literal["transformer", "text_encoder"]


def load_pipeline(
    pretrained_model_name_or_path: str | PipelineInfo,
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer_path: str | None = None,
    transformer_2_path: str | None = None,
    lora_path: str | Sequence[str] | None = None,
    lora_2_path: str | Sequence[str] | None = None,
    lora_weights: Sequence[float] | None = None,
    lora_2_weights: Sequence[float] | None = None,
    lora_scale: float = 1.0,
    sample_solver: SampleSolver | None = None,
    flow_shift: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    cpu_offload: CPUOffload = "none",
    text_encoder_on_cpu: bool = False,
    context_parallel: ContextParallelGroup | None = None,
    shard_weights: Sequence[ShardedModel] = (),
    attention_backend: str | None = None,
    step_cache: StepCacheKind = "none",
    step_cache_threshold: float | None = None,
    step_cache_interval: int | None = None,
) -> WanPipeline | WanImageToVideoPipeline:
    """
    Load the pipeline that `model_index.json` names, with a tuned transformer or LoRAs, another solver and its shift.

    Args:
        pretrained_model_name_or_path (`str` or [`~hy_prfl.formats.pipeline_info.PipelineInfo`]):
            Folder of the pipeline or its id on the Hub, or what has been read of it already, with its revision.
        transformer_path (`str`, *optional*):
            Fully fine-tuned transformer that replaces the pipeline's: a folder or a Hub id.
        lora_path (`str` or sequence of `str`, *optional*):
            LoRA weights in any format that [`~hy_prfl.formats.lora.read_adapter`] knows: files, folders or Hub ids. The
            updates of several LoRAs add up. The layers of a single LoRA become the adapter `prfl`, those of several
            `prfl_1`, `prfl_2` and so on. Updates of full weights (norms, biases) are added to these weights at once: a
            strength that is set later does not change them.
        lora_weights (sequence of `float`, *optional*):
            Strength of each LoRA; `lora_scale` for all of them if left out.
        transformer_2_path (`str`, *optional*), lora_2_path, lora_2_weights (*optional*):
            The same for the low-noise expert of a pipeline of two (Wan2.2 A14B).
        sample_solver (`str`, *optional*):
            `"unipc"`, `"dpm++"` or `"euler"`; the pipeline's own scheduler if left out. See [`build_scheduler`].
        flow_shift (`float`, *optional*):
            Replaces the shift of the pipeline's scheduler.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`):
            Type of transformer and text encoder. VAE and image encoder are always float32, as diffusers recommends.
        cpu_offload (`str`, defaults to `"none"`):
            Keep weights in CPU memory: `"model"` moves whole models, `"sequential"` single layers. Needs a GPU.
        text_encoder_on_cpu (`bool`, defaults to `False`):
            Keep the text encoder on the CPU, and encode prompts there.
        context_parallel (`ContextParallelGroup`, *optional*):
            Processes that make each video together. Every one of them must load and call the pipeline with the same
            arguments, and gets the same result.
        shard_weights (sequence of `str`, defaults to none):
            `"transformer"` (both, if there are two), `"text_encoder"`: models whose weights are sharded over the
            processes of `context_parallel`. Each process reads all of them into CPU memory first.
        attention_backend (`str`, *optional*):
            Attention kernel of the transformers, one that [`~hy_prfl.runtime.attention.check_attention_backend`] accepts.
        step_cache (`str`, defaults to `"none"`):
            diffusers' caching of denoising steps, with `step_cache_threshold` or `step_cache_interval`.

    Raises:
        ValueError: If the transformer or the LoRA does not fit the pipeline, naming the keys, or an option does not
            fit it.
        FileNotFoundError: If there is nothing at `lora_path`, or no weights in it.

    Example:
        ```python
        pipeline = load_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", lora_path="outputs/prfl", device="cuda")
        generate_videos(pipeline, [VideoPrompt(id="cat", caption="a cat plays the piano")], "outputs/videos")
        ```
    """
    device = torch.device(device)
    if cpu_offload != "none" and device.type == "cpu":
        raise ValueError(f"`cpu_offload` '{cpu_offload}' needs an accelerator, the device is the CPU.")
    if shard_weights and (context_parallel is None or cpu_offload != "none"):
        raise ValueError(
            f"`shard_weights` {list(shard_weights)} needs `context_parallel`, and does not work with `cpu_offload`."
        )
    if text_encoder_on_cpu and (cpu_offload != "none" or "text_encoder" in shard_weights):
        raise ValueError(
            "`text_encoder_on_cpu` does not work with `cpu_offload`, nor with text_encoder in `shard_weights`."
        )
    if context_parallel is not None and step_cache != "none":
        raise ValueError(
            f"`step_cache` '{step_cache}' does not work with `context_parallel`: processes would skip different steps."
        )
    tuned: dict[ExpertName, str | None] = {"high_noise": transformer_path, "low_noise": transformer_2_path}
    lora_paths: dict[ExpertName, list[str]] = {"high_noise": as_list(lora_path), "low_noise": as_list(lora_2_path)}
    weights_given: dict[ExpertName, Sequence[float] | None] = {"high_noise": lora_weights, "low_noise": lora_2_weights}
    strengths = {
        expert: [lora_scale] * len(lora_paths[expert]) if weights is None else weights
        for expert, weights in weights_given.items()
    }
    for expert, paths in lora_paths.items():
        if len(strengths[expert]) != len(paths):
            raise ValueError(
                f"`{LORA_OPTIONS[expert]}`: {len(paths)} LoRAs and {len(strengths[expert])} weights for them."
            )
    info = PipelineInfo.of(pretrained_model_name_or_path, revision)
    cache_config = _step_cache_config(
        step_cache,
        step_cache_threshold,
        step_cache_interval,
        dtype=dtype,
        image_to_video=info.is_image_to_video,
    )
    given = {TRANSFORMER_OPTIONS["low_noise"]: transformer_2_path, LORA_OPTIONS["low_noise"]: lora_2_path}
    check_options_fit(info, {**given, "lora_path": lora_path})
    loras = {expert: [read_lora(path, expert) for path in paths] for expert, paths in lora_paths.items() if paths}
    if not lora_2_path and info.has_two_experts:
        warn_of_unnamed_experts(loras.get("high_noise", []))
    for expert, found in loras.items():
        model: tuple[str, str | None, str | None] = (info.source, EXPERT_FOLDERS[expert], info.revision)
        option, path = "pretrained_model_name_or_path", tuned[expert]
        if path is not None:
            option, model = TRANSFORMER_OPTIONS[expert], (path, None, None)
        for file, adapter in found:
            with reading(option, model[0]):
                check_lora_fits(adapter, file, expert, *model)
    replaced: dict[str, Any] = {}
    if sample_solver is not None or flow_shift is not None:
        replaced["scheduler"] = build_scheduler(load_own_scheduler(info), sample_solver, flow_shift)
    replaced |= {
        EXPERT_FOLDERS[expert]: load_tuned_transformer(path, info.source, expert, revision=info.revision, dtype=dtype)
        for expert, path in tuned.items()
        if path is not None
    }
    # Called on the class itself: `DiffusionPipeline.from_pretrained` would silently drop a `transformer`.
    pipeline = info.pipeline_class.from_pretrained(
        info.source,
        revision=info.revision,
        variant=variant,
        dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
        **replaced,
    )
    for name in EXPERT_FOLDERS.values():
        transformer = getattr(pipeline, name, None)
        if transformer is not None and name not in replaced:
            check_finite(transformer.named_parameters(), source=f"{info.source}/{name}")
    for expert, found in loras.items():
        add_loras(getattr(pipeline, EXPERT_FOLDERS[expert]), found, strengths[expert], expert)
    transformers = [model for model in (pipeline.transformer, pipeline.transformer_2) if model is not None]
    if cache_config is not None:
        for transformer in transformers:
            transformer.enable_cache(cache_config)
    if attention_backend is not None:
        for transformer in transformers:
            set_attention_backend(transformer, attention_backend)
    if context_parallel is not None:
        _split_over_processes(pipeline, context_parallel, shard_weights, device)
    _place(pipeline, device, cpu_offload, text_encoder_on_cpu)
    return pipeline


def _split_over_processes(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    context_parallel: ContextParallelGroup,
    shard_weights: Sequence[ShardedModel],
    device: torch.device,
) -> None:
    """Split the tokens of the transformers over a group of processes, and shard the weights of the named models."""
    transformers = [model for model in (pipeline.transformer, pipeline.transformer_2) if model is not None]
    for transformer in transformers:
        context_parallel.split(transformer)
    sharded = transformers if "transformer" in shard_weights else []
    for model in [*sharded, *([pipeline.text_encoder] if "text_encoder" in shard_weights else [])]:
        shard_frozen_model(model, model._no_split_modules, device, context_parallel.mesh)


def _place(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    device: torch.device,
    offload: CPUOffload,
    text_encoder_on_cpu: bool,
) -> None:
    """Move the models to their devices, or let diffusers move them when they are needed."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and not (name == "text_encoder" and text_encoder_on_cpu):
                component.to(device)


def _step_cache_config(
    step_cache: StepCacheKind,
    threshold: float | None,
    interval: int | None,
    *,
    dtype: torch.dtype,
    image_to_video: bool,
) -> FirstBlockCacheConfig | TaylorSeerCacheConfig | SeaCacheConfig | None:
    """Settings of diffusers' cache; None without one. `dtype` is the type of the transformers."""
    if step_cache == "none":
        return None
    if step_cache == "first_block":
        return FirstBlockCacheConfig() if threshold is None else FirstBlockCacheConfig(threshold=threshold)
    if step_cache == "taylorseer":
        # The lite mode predicts the output of the last layer and skips all blocks. The full mode would keep hundreds of
        # gigabytes of block outputs of a 14B model, and diffusers' default patterns match no module of Wan. Factors
        # are kept in the model's own type.
        options = {"use_lite_mode": True, "taylor_factors_dtype": dtype}
        return TaylorSeerCacheConfig(**options) if interval is None else TaylorSeerCacheConfig(interval, **options)
    if step_cache == "sea":
        if image_to_video:
            raise ValueError("`step_cache` 'sea' works with text-to-video pipelines only.")
        return SeaCacheConfig() if threshold is None else SeaCacheConfig(threshold=threshold)
    raise ValueError(f"`step_cache` must be none, first_block, taylorseer or sea, got {step_cache!r}.")
