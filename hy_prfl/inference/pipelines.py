"""Loads the stock diffusers Wan pipelines with what was trained put in: a transformer, a LoRA, another shift."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from ..configs.base import check
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.lora import FILE_NAMES, UPSTREAM_FILES, Adapter, read_adapter
from ..formats.lora_loading import check_adapter_fits, load_adapter
from ..formats.lora_metadata import read_lora_metadata
from ..formats.pipeline_info import PipelineInfo
from ..formats.weight_files import check_finite


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
            LoRA weights in any format that [`~models.adapters.read_adapter`] knows: a file, a folder or a Hub id. All of
            it is applied with strength `lora_scale`. Its layers become the adapter `prfl`; what it adds to whole weights
            (norms, biases) is in the weights from then on, also if the strength is set anew.
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
        ValueError: If the transformer or the LoRA does not fit the pipeline, naming the keys, or an option does not
            fit it.
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
    given = {TRANSFORMER_OPTIONS["low_noise"]: transformer_2_path, LORA_OPTIONS["low_noise"]: lora_2_path}
    check_options_fit(pretrained_model_name_or_path, {**given, "lora_path": lora_path}, revision=revision)
    loras = {expert: _read_lora(path, expert) for expert, path in lora_paths.items() if path is not None}
    for expert, (file, adapter) in loras.items():
        model = (pretrained_model_name_or_path, EXPERT_FOLDERS[expert], revision)
        path = tuned[expert]
        _check_lora_fits(adapter, file, expert, *(model if path is None else (path, None, None)))
    replaced = {
        EXPERT_FOLDERS[expert]: _load_tuned_transformer(
            path, pretrained_model_name_or_path, expert, revision=revision, dtype=dtype
        )
        for expert, path in tuned.items()
        if path is not None
    }
    # Called on the class itself: `DiffusionPipeline.from_pretrained` would drop a `transformer` without a word.
    pipeline = PipelineInfo.read(pretrained_model_name_or_path, revision).pipeline_class.from_pretrained(
        pretrained_model_name_or_path,
        revision=revision,
        variant=variant,
        dtype={"default": dtype, "vae": torch.float32, "image_encoder": torch.float32},
        **replaced,
    )
    for name in EXPERT_FOLDERS.values():
        transformer = getattr(pipeline, name, None)
        if transformer is not None and name not in replaced:
            check_finite(transformer.named_parameters(), source=f"{pretrained_model_name_or_path}/{name}")
    if flow_shift is not None:
        if "flow_shift" not in pipeline.scheduler.config:
            raise ValueError(f"`flow_shift`: the pipeline's {type(pipeline.scheduler).__name__} has no such setting.")
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=flow_shift)
    names = [
        load_adapter(
            getattr(pipeline, EXPERT_FOLDERS[expert]),
            adapter,
            LORA_ADAPTER,
            scale=lora_scale,
            source=_source(expert, file),
        )
        for expert, (file, adapter) in loras.items()
    ]
    if any(names):
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
    if PipelineInfo.read(pretrained_model_name_or_path, revision).has_two_experts:
        return
    without = f"{pretrained_model_name_or_path}: model_index.json has no `transformer_2`"
    for name in (TRANSFORMER_OPTIONS["low_noise"], LORA_OPTIONS["low_noise"]):
        check(options.get(name) is None, name, options.get(name), f"left out, {without}")
    path = options.get(LORA_OPTIONS["high_noise"])
    if path is None or not Path(path).exists():
        return
    pair = any({*names.values()} <= {each.name for each in Path(path).glob("*")} for names in FILE_NAMES.values())
    is_of_two = pair or _trained_expert(find_lora_weights(path), "high_noise") is not None
    check(not is_of_two, LORA_OPTIONS["high_noise"], path, f"a LoRA of one transformer, not of a pair: {without}")


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
    check_finite(transformer.named_parameters(), source=f"`{option}` '{transformer_path}'")
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
    name = _choose_lora_file([file.name for file in path.glob("*.safetensors")], f"`{option}` '{lora_path}'", expert)
    return str(path / name)


def _choose_lora_file(names: Sequence[str], source: str, expert: ExpertName) -> str:
    """The file of a folder or repository that counts: the one for the expert, as diffusers or `convert` name it."""
    others: set[str] = set()
    for written in FILE_NAMES.values():
        if written[expert] in names:
            return written[expert]
        others |= set(written.values())
    rest = sorted(set(names) - others)
    if expert == "high_noise" and set(UPSTREAM_FILES) <= set(rest):
        # Three times the same weights.
        return next(iter(UPSTREAM_FILES))
    if len(rest) != 1:
        shown = f": {', '.join(sorted(names)[:5])}{', ...' * (len(names) > 5)}" if names else ""
        raise FileNotFoundError(
            f"{source}: expected {LORA_FILES[expert]} or one safetensors file, found {len(names)}{shown}. Give one "
            "file of them."
        )
    return rest[0]


def _source(expert: ExpertName, file: str) -> str:
    return f"`{LORA_OPTIONS[expert]}` '{file}'"


def _read_lora(lora_path: str, expert: ExpertName) -> tuple[str, Adapter]:
    """A LoRA and the file that it is from, which is fetched if it is on the Hub."""
    option, file = LORA_OPTIONS[expert], find_lora_weights(lora_path, expert)
    if not Path(file).is_file():
        file = _download_lora(lora_path, expert)
    trained = _trained_expert(file, expert)
    fits = trained is None or trained == expert
    check(fits, option, file, f"of the {expert} expert, this LoRA is of the {trained}")
    try:
        return file, read_adapter(file)
    except ValueError as error:
        raise ValueError(f"`{option}` {error}") from error


def _trained_expert(file: str, expert: ExpertName) -> str | None:
    """The expert that a LoRA given for `expert` was trained for, if its header tells."""
    if Path(file).suffix != ".safetensors":
        return None
    try:
        return read_lora_metadata(file).get("expert")
    except ValueError as error:
        raise ValueError(f"`{LORA_OPTIONS[expert]}` {error}") from error


def _download_lora(repo_id: str, expert: ExpertName) -> str:
    """Fetch the LoRA of a repository, and no other file of it; offline take it from the cache."""
    source = f"`{LORA_OPTIONS[expert]}` '{repo_id}'"
    try:
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, local_files_only=True))
            names = [file.name for file in folder.glob("*.safetensors")]
            return str(folder / _choose_lora_file(names, source, expert))
        names = [name for name in HfApi().list_repo_files(repo_id) if re.fullmatch(r"[^/]*\.safetensors", name)]
        return hf_hub_download(repo_id, _choose_lora_file(names, source, expert))
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source}: neither a file or folder here nor a repository: {error}") from error


def _check_lora_fits(
    adapter: Adapter, file: str, expert: ExpertName, path: str, subfolder: str | None, revision: str | None
) -> None:
    """Check a LoRA against the configuration of the transformer that it goes to, before any weights are read."""
    config = WanTransformer3DModel.load_config(path, subfolder=subfolder, revision=revision)
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config)
    check_adapter_fits(adapter, transformer, source=_source(expert, file))


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
