"""Loads the stock diffusers Wan pipelines with what was trained put in: a transformer, a LoRA, another shift."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig

from .data.encoding import find_pipeline_class


CPUOffload = Literal["none", "model", "sequential"]
StepCache = Literal["none", "first_block", "taylorseer", "sea"]

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_ADAPTER = "prfl"

# What a transformer must share with the one that it replaces in a pipeline.
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")


def load_pipeline(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer_path: str | None = None,
    lora_path: str | None = None,
    lora_scale: float = 1.0,
    flow_shift: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    cpu_offload: CPUOffload = "none",
    step_cache: StepCache = "none",
    step_cache_threshold: float | None = None,
    step_cache_interval: int | None = None,
) -> WanPipeline | WanImageToVideoPipeline:
    """
    Load the pipeline that `model_index.json` names, with a tuned transformer or LoRA and the sampler's shift.

    Args:
        transformer_path (`str`, *optional*):
            Fully fine-tuned transformer that replaces the pipeline's: a folder or a Hub id.
        lora_path (`str`, *optional*):
            LoRA weights: a file, a folder or a Hub id; applied with strength `lora_scale`.
        flow_shift (`float`, *optional*):
            Replaces the shift of the pipeline's scheduler.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`):
            Type of transformer and text encoder. VAE and image encoder are always float32, as diffusers recommends.
        cpu_offload (`str`, defaults to `"none"`):
            Keep weights in CPU memory: `"model"` moves whole models, `"sequential"` single layers. Needs a GPU.
        step_cache (`str`, defaults to `"none"`):
            diffusers' caching of denoising steps, with `step_cache_threshold` or `step_cache_interval`.

    Raises:
        ValueError: If the transformer or the LoRA does not fit the pipeline, or an option does not fit it.
        FileNotFoundError: If there is nothing at `lora_path`, or no weights in it.

    Example:
        ```python
        pipeline = load_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", lora_path="outputs/prfl/lora", device="cuda")
        generate_videos(pipeline, [VideoPrompt(id="cat", caption="a cat plays the piano")], "outputs/videos")
        ```
    """
    device = torch.device(device)
    if cpu_offload != "none" and device.type == "cpu":
        raise ValueError(f"`cpu_offload` '{cpu_offload}' needs an accelerator, the device is the CPU.")
    lora = None if lora_path is None else _lora_options(lora_path)
    replaced: dict[str, Any] = {}
    if transformer_path is not None:
        replaced["transformer"] = _load_tuned_transformer(
            transformer_path, pretrained_model_name_or_path, revision=revision, dtype=dtype
        )
    # Called on the class itself: `DiffusionPipeline.from_pretrained` would drop a `transformer` without a word.
    pipeline = find_pipeline_class(pretrained_model_name_or_path, revision).from_pretrained(
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
        **replaced,
    )
    if flow_shift is not None:
        if "flow_shift" not in pipeline.scheduler.config:
            raise ValueError(f"`flow_shift`: the pipeline's {type(pipeline.scheduler).__name__} has no such setting.")
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=flow_shift)
    if lora is not None:
        pipeline.load_lora_weights(**lora, adapter_name=LORA_ADAPTER)
        if LORA_ADAPTER not in pipeline.get_list_adapters().get("transformer", []):
            raise ValueError(f"`lora_path` '{lora_path}' has no weights for the transformer.")
        pipeline.set_adapters([LORA_ADAPTER], adapter_weights=[lora_scale])
    if step_cache != "none":
        _enable_step_cache(pipeline, step_cache, step_cache_threshold, step_cache_interval)
    if cpu_offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif cpu_offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def _load_tuned_transformer(
    transformer_path: str, pretrained_model_name_or_path: str, *, revision: str | None, dtype: torch.dtype
) -> WanTransformer3DModel:
    expected = WanTransformer3DModel.load_config(
        pretrained_model_name_or_path, subfolder="transformer", revision=revision
    )
    transformer, info = WanTransformer3DModel.from_pretrained(transformer_path, dtype=dtype, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            keys = ", ".join(str(key) for key in list(info[problem])[:5])
            raise ValueError(
                f"`transformer_path` '{transformer_path}': {len(info[problem])} {problem}, such as {keys}."
            )
    different = [
        f"`{name}` {transformer.config[name]} against {expected[name]}"
        for name in INTERFACE
        if name in expected and _plain(transformer.config[name]) != _plain(expected[name])
    ]
    if different:
        raise ValueError(
            f"`transformer_path` '{transformer_path}' does not fit the pipeline '{pretrained_model_name_or_path}': "
            f"{', '.join(different)}."
        )
    return transformer


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_lora_weights(lora_path: str) -> str:
    """
    The file that a LoRA is read from, or the Hub id as it is.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a folder, or it is unclear which file counts.
    """
    path = Path(lora_path)
    if path.is_file():
        return lora_path
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", lora_path):
            raise FileNotFoundError(f"`lora_path` '{lora_path}': there is no such file or folder.")
        return lora_path
    names = [file.name for file in sorted(path.glob("*.safetensors"))]
    if LORA_WEIGHTS in names:
        names = [LORA_WEIGHTS]
    if len(names) != 1:
        raise FileNotFoundError(
            f"`lora_path` '{lora_path}': expected {LORA_WEIGHTS} or one safetensors file, found {len(names)}."
        )
    return str(path / names[0])


def _lora_options(lora_path: str) -> dict[str, Any]:
    """Where `load_lora_weights` finds the file; it guesses only for Hub ids, and never offline."""
    path = Path(find_lora_weights(lora_path))
    if path.is_file():
        return {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
    return {"pretrained_model_name_or_path_or_dict": lora_path}


def _enable_step_cache(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    step_cache: StepCache,
    threshold: float | None,
    interval: int | None,
) -> None:
    config: FirstBlockCacheConfig | TaylorSeerCacheConfig | SeaCacheConfig
    if step_cache == "first_block":
        config = FirstBlockCacheConfig() if threshold is None else FirstBlockCacheConfig(threshold=threshold)
    elif step_cache == "taylorseer":
        # The lite mode predicts the output of the last layer and skips all blocks. The full mode would keep hundreds of
        # gigabytes of block outputs of a 14B model, and diffusers' default patterns match no module of Wan. Factors
        # are kept in the model's own type.
        options = {"use_lite_mode": True, "taylor_factors_dtype": pipeline.transformer.dtype}
        config = TaylorSeerCacheConfig(**options) if interval is None else TaylorSeerCacheConfig(interval, **options)
    elif step_cache == "sea":
        if isinstance(pipeline, WanImageToVideoPipeline):
            raise ValueError("`step_cache` 'sea' works with text-to-video pipelines only.")
        config = SeaCacheConfig() if threshold is None else SeaCacheConfig(threshold=threshold)
    else:
        raise ValueError(f"`step_cache` must be none, first_block, taylorseer or sea, got {step_cache!r}.")
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        if transformer is not None:
            transformer.enable_cache(config)
