"""Loads the stock diffusers Wan pipelines with what was trained put in: a transformer, a LoRA, another shift."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig

from .configs.base import check
from .data.encoding import find_pipeline_class
from .models.experts import EXPERT_FOLDERS, LORA_FILES, ExpertName, has_two_experts
from .models.lora_metadata import read_lora_metadata


CPUOffload = Literal["none", "model", "sequential"]
StepCache = Literal["none", "first_block", "taylorseer", "sea"]

LORA_ADAPTER = "prfl"
# Options of what is tuned, a transformer and a LoRA for each expert; a pipeline of one transformer has the first only.
TRANSFORMER_OPTIONS: dict[ExpertName, str] = {"high_noise": "transformer_path", "low_noise": "transformer_2_path"}
LORA_OPTIONS: dict[ExpertName, str] = {"high_noise": "lora_path", "low_noise": "lora_2_path"}

# What a transformer must share with the one that it replaces in a pipeline.
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")


def load_pipeline(
    pretrained_model_name_or_path: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer_path: str | None = None,
    transformer_2_path: str | None = None,
    lora_path: str | None = None,
    lora_2_path: str | None = None,
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
        transformer_2_path, lora_2_path (`str`, *optional*):
            The same for the low-noise expert of a pipeline of two (Wan2.2 A14B).
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
    tuned: dict[ExpertName, str | None] = {"high_noise": transformer_path, "low_noise": transformer_2_path}
    lora_paths: dict[ExpertName, str | None] = {"high_noise": lora_path, "low_noise": lora_2_path}
    loras = {expert: _lora_options(path, expert) for expert, path in lora_paths.items() if path is not None}
    replaced = {
        EXPERT_FOLDERS[expert]: _load_tuned_transformer(
            path, pretrained_model_name_or_path, expert, revision=revision, dtype=dtype
        )
        for expert, path in tuned.items()
        if path is not None
    }
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
    for expert, options in loras.items():
        pipeline.load_lora_weights(**options, adapter_name=LORA_ADAPTER, load_into_transformer_2=expert == "low_noise")
        if LORA_ADAPTER not in pipeline.get_list_adapters().get(EXPERT_FOLDERS[expert], []):
            raise ValueError(
                f"`{LORA_OPTIONS[expert]}` '{lora_paths[expert]}' has no weights for the {EXPERT_FOLDERS[expert]}."
            )
    if loras:
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


def check_options_fit(
    pretrained_model_name_or_path: str, options: Mapping[str, Any], *, revision: str | None = None
) -> None:
    """Raise a `ValueError` if something is given for a second transformer that the pipeline has not."""
    has_second = has_two_experts(DiffusionPipeline.load_config(pretrained_model_name_or_path, revision=revision))
    for name in (TRANSFORMER_OPTIONS["low_noise"], LORA_OPTIONS["low_noise"]):
        fits = options.get(name) is None or has_second
        without = f"{pretrained_model_name_or_path}: model_index.json has no `transformer_2`"
        check(fits, name, options.get(name), f"left out, {without}")


def _load_tuned_transformer(
    transformer_path: str,
    pretrained_model_name_or_path: str,
    expert: ExpertName,
    *,
    revision: str | None,
    dtype: torch.dtype,
) -> WanTransformer3DModel:
    option = TRANSFORMER_OPTIONS[expert]
    expected = WanTransformer3DModel.load_config(
        pretrained_model_name_or_path, subfolder=EXPERT_FOLDERS[expert], revision=revision
    )
    transformer, info = WanTransformer3DModel.from_pretrained(transformer_path, dtype=dtype, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            keys = ", ".join(str(key) for key in list(info[problem])[:5])
            raise ValueError(f"`{option}` '{transformer_path}': {len(info[problem])} {problem}, such as {keys}.")
    different = [
        f"`{name}` {transformer.config[name]} against {expected[name]}"
        for name in INTERFACE
        if name in expected and _plain(transformer.config[name]) != _plain(expected[name])
    ]
    if different:
        raise ValueError(
            f"`{option}` '{transformer_path}' does not fit the pipeline '{pretrained_model_name_or_path}': "
            f"{', '.join(different)}."
        )
    return transformer


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_lora_weights(lora_path: str, expert: ExpertName = "high_noise") -> str:
    """
    The file that a LoRA is read from, or the Hub id as it is.

    Args:
        expert (`str`, defaults to `"high_noise"`):
            The expert that it is for. The folder of a run that trained both has a file for each.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a folder, or it is unclear which file counts.
    """
    path, option = Path(lora_path), LORA_OPTIONS[expert]
    if path.is_file():
        return lora_path
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", lora_path):
            raise FileNotFoundError(f"`{option}` '{lora_path}': there is no such file or folder.")
        return lora_path
    names = {file.name for file in path.glob("*.safetensors")}
    own = LORA_FILES[expert]
    names = {own} if own in names else names - set(LORA_FILES.values())
    if len(names) != 1:
        raise FileNotFoundError(
            f"`{option}` '{lora_path}': expected {own} or one safetensors file, found {len(names)}."
        )
    return str(path / names.pop())


def _lora_options(lora_path: str, expert: ExpertName) -> dict[str, Any]:
    """Where `load_lora_weights` finds the file; it guesses only for Hub ids, and never offline."""
    path = Path(find_lora_weights(lora_path, expert))
    if not path.is_file():
        own = {} if expert == "high_noise" else {"weight_name": LORA_FILES[expert]}
        return {"pretrained_model_name_or_path_or_dict": lora_path, **own}
    trained = read_lora_metadata(path).get("expert", expert) if path.suffix == ".safetensors" else expert
    check(trained == expert, LORA_OPTIONS[expert], str(path), f"of the {expert} expert, this LoRA is of the {trained}")
    return {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}


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
