"""
Loads the stock diffusers Wan pipelines with what was trained put in, a transformer or LoRAs, with another solver or shift,
and split over the processes that make a video together.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn

from ..configs.base import check
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.lora import FILE_NAMES, UPSTREAM_FILES, Adapter, read_adapter
from ..formats.lora_loading import check_adapter_fits, load_adapter
from ..formats.lora_metadata import read_lora_metadata
from ..formats.pipeline_info import PipelineInfo
from ..formats.weight_files import check_finite, read_json
from ..runtime.attention import set_attention_backend
from ..runtime.context_parallel import ContextParallelGroup, check_divisible
from ..runtime.sharding import shard_frozen_model


logger = logging.getLogger(__name__)

CPUOffload = Literal["none", "model", "sequential"]
StepCache = Literal["none", "first_block", "taylorseer", "sea"]
SampleSolver = Literal["unipc", "dpm++", "euler"]
ShardedModel = Literal["transformer", "text_encoder"]

# Name of the adapter of a LoRA that is alone; of several, the names are numbered.
LORA_ADAPTER = "prfl"
# Options of what is tuned, a transformer and a LoRA for each expert; a pipeline of one transformer has the first only.
TRANSFORMER_OPTIONS: dict[ExpertName, str] = {"high_noise": "transformer_path", "low_noise": "transformer_2_path"}
LORA_OPTIONS: dict[ExpertName, str] = {"high_noise": "lora_path", "low_noise": "lora_2_path"}

# What makes diffusers' schedulers solve the ODE of flow matching with the sigmas that Wan has.
FLOW_MATCHING = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

# What a transformer must share with the one that it replaces in a pipeline.
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")


def load_pipeline(
    pretrained_model_name_or_path: str,
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
    step_cache: StepCache = "none",
    step_cache_threshold: float | None = None,
    step_cache_interval: int | None = None,
) -> WanPipeline | WanImageToVideoPipeline:
    """
    Load the pipeline that `model_index.json` names, with a tuned transformer or LoRAs, another solver and its shift.

    Args:
        transformer_path (`str`, *optional*):
            Fully fine-tuned transformer that replaces the pipeline's: a folder or a Hub id.
        lora_path (`str` or sequence of `str`, *optional*):
            LoRA weights in any format that [`~hy_prfl.formats.lora.read_adapter`] knows: files, folders or Hub ids. All of
            each is applied, and their updates are added up. The layers of one LoRA become the adapter `prfl`, those of
            several `prfl_1`, `prfl_2` and so on; what a LoRA adds to whole weights (norms, biases) is in the weights from
            then on, also if the strength is set again.
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
            Leave the text encoder on the CPU, where it then computes.
        context_parallel (`ContextParallelGroup`, *optional*):
            Processes that make each video together. Every one of them must load and call the pipeline with the same
            arguments, and gets the same result.
        shard_weights (sequence of `str`, defaults to none):
            `"transformer"` (both, if there are two), `"text_encoder"`: models whose weights are split over the processes
            of `context_parallel`. Each process reads all of them into CPU memory first.
        attention_backend (`str`, *optional*):
            Attention kernel of the transformers that [`~hy_prfl.runtime.attention.check_attention_backend`] lets through.
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
    if shard_weights and (context_parallel is None or cpu_offload != "none"):
        raise ValueError(
            f"`shard_weights` {list(shard_weights)} needs a group of processes and goes without `cpu_offload`."
        )
    if text_encoder_on_cpu and (cpu_offload != "none" or "text_encoder" in shard_weights):
        raise ValueError(
            "`text_encoder_on_cpu` goes without `cpu_offload`, and without text_encoder in `shard_weights`."
        )
    if context_parallel is not None and step_cache != "none":
        raise ValueError(
            f"`step_cache` '{step_cache}' goes without `context_parallel`: processes would skip other steps."
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
    given = {TRANSFORMER_OPTIONS["low_noise"]: transformer_2_path, LORA_OPTIONS["low_noise"]: lora_2_path}
    check_options_fit(pretrained_model_name_or_path, {**given, "lora_path": lora_path}, revision=revision)
    loras = {expert: [_read_lora(path, expert) for path in paths] for expert, paths in lora_paths.items() if paths}
    if not lora_2_path and PipelineInfo.read(pretrained_model_name_or_path, revision).has_two_experts:
        _warn_of_unnamed_experts(loras.get("high_noise", []))
    for expert, found in loras.items():
        model = (pretrained_model_name_or_path, EXPERT_FOLDERS[expert], revision)
        path = tuned[expert]
        for file, adapter in found:
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
    pipeline.scheduler = build_scheduler(pipeline.scheduler, sample_solver, flow_shift)
    for expert, found in loras.items():
        _add_loras(getattr(pipeline, EXPERT_FOLDERS[expert]), found, strengths[expert], expert)
    if step_cache != "none":
        _enable_step_cache(pipeline, step_cache, step_cache_threshold, step_cache_interval)
    transformers = [model for model in (pipeline.transformer, pipeline.transformer_2) if model is not None]
    if attention_backend is not None:
        for transformer in transformers:
            set_attention_backend(transformer, attention_backend)
    if context_parallel is not None:
        _split_over_processes(pipeline, context_parallel, shard_weights, device)
    _place(pipeline, device, cpu_offload, text_encoder_on_cpu)
    return pipeline


def build_scheduler(
    scheduler: SchedulerMixin, sample_solver: SampleSolver | None = None, flow_shift: float | None = None
) -> SchedulerMixin:
    """
    A scheduler of diffusers like the given one, with another solver or another shift of the noise levels.

    Args:
        scheduler (`SchedulerMixin`):
            A pipeline's scheduler. Its other settings are kept where the new one has them.
        sample_solver (`str`, *optional*):
            `"unipc"` (`UniPCMultistepScheduler`), `"dpm++"` (`DPMSolverMultistepScheduler` with `dpmsolver++`) or `"euler"`
            (`FlowMatchEulerDiscreteScheduler`); that of `scheduler` if left out.
        flow_shift (`float`, *optional*):
            Shift `s` in `sigma -> s * sigma / (1 + (s - 1) * sigma)`; that of `scheduler` if left out.

    Raises:
        ValueError: If the scheduler is none of flow matching, that is, has no shift.
    """
    name = next((name for name in ("flow_shift", "shift") if name in scheduler.config), None)
    if name is None and (flow_shift is not None or sample_solver is not None):
        option = "sample_solver" if flow_shift is None else "flow_shift"
        raise ValueError(f"`{option}`: the pipeline's {type(scheduler).__name__} has no shift of flow matching.")
    shift = scheduler.config[name] if flow_shift is None and name is not None else flow_shift
    if sample_solver == "unipc":
        return UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=shift, **FLOW_MATCHING)
    if sample_solver == "dpm++":
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, flow_shift=shift, algorithm_type="dpmsolver++", **FLOW_MATCHING
        )
    if sample_solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    if sample_solver is not None:
        raise ValueError(f"`sample_solver` must be unipc, dpm++ or euler, got {sample_solver!r}.")
    return scheduler if flow_shift is None else type(scheduler).from_config(scheduler.config, **{str(name): shift})


def check_split_fits(
    pretrained_model_name_or_path: str,
    degree: int,
    shapes: Iterable[tuple[int, int, int]],
    *,
    ring_degree: int = 1,
    revision: str | None = None,
    transformer_path: str | None = None,
    transformer_2_path: str | None = None,
) -> None:
    """
    Refuse videos whose tokens, or transformers whose heads, do not divide over the processes of a video.

    Args:
        degree (`int`):
            Processes that make a video together.
        ring_degree (`int`, defaults to 1):
            The part of them that heads need not divide over.
        shapes (`Iterable[tuple[int, int, int]]`):
            Frames, height and width of the videos in pixels.

    Raises:
        ValueError: Naming the shape of the latents, or the heads, and the degrees that would fit.
    """
    path = pretrained_model_name_or_path
    vae = _vae_config(path, revision)
    spatial, temporal = vae["scale_factor_spatial"], vae["scale_factor_temporal"]
    latents = [
        (vae["z_dim"], (num_frames - 1) // temporal + 1, height // spatial, width // spatial)
        for num_frames, height, width in shapes
    ]
    tuned: dict[ExpertName, str | None] = {"high_noise": transformer_path, "low_noise": transformer_2_path}
    if not PipelineInfo.read(path, revision).has_two_experts:
        del tuned["low_noise"]
    for expert, replacement in tuned.items():
        model = (path, EXPERT_FOLDERS[expert], revision) if replacement is None else (replacement, None, None)
        config = WanTransformer3DModel.load_config(model[0], subfolder=model[1], revision=model[2])
        heads, patch_size = config["num_attention_heads"], config["patch_size"]
        check_divisible(
            degree,
            num_heads=heads,
            patch_size=patch_size,
            shapes=latents,
            source=f"'{model[0]}'",
            ring_degree=ring_degree,
        )


def size_multiple(pretrained_model_name_or_path: str, revision: str | None = None) -> int:
    """Pixels that height and width of a pipeline's videos are multiples of, told by its configuration alone."""
    return 2 * int(_vae_config(pretrained_model_name_or_path, revision)["scale_factor_spatial"])


def _vae_config(path: str, revision: str | None) -> dict[str, Any]:
    """Configuration of a pipeline's VAE; that of Wan2.1 does not say all of it."""
    config = AutoencoderKLWan.load_config(path, subfolder="vae", revision=revision)
    return {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "z_dim": 16, **config}


def as_list(paths: str | Sequence[str] | None) -> list[str]:
    """Paths as a list, which is empty if there are none."""
    if paths is None:
        return []
    return [paths] if isinstance(paths, str) else list(paths)


def _add_loras(
    transformer: WanTransformer3DModel,
    loras: Sequence[tuple[str, Adapter]],
    strengths: Sequence[float],
    expert: ExpertName,
) -> None:
    """Put LoRAs, each with the file that it is from, into a transformer, whose adapters are all active afterwards."""
    active = {}
    for number, ((file, adapter), strength) in enumerate(zip(loras, strengths, strict=True), 1):
        name = LORA_ADAPTER if len(loras) == 1 else f"{LORA_ADAPTER}_{number}"
        if load_adapter(transformer, adapter, name, scale=strength, source=_source(expert, file)):
            active[name] = strength
    if active:
        transformer.set_adapters(list(active), list(active.values()))


def check_options_fit(
    pretrained_model_name_or_path: str, options: Mapping[str, Any], *, revision: str | None = None
) -> None:
    """Raise a `ValueError` if something is given for a second transformer that the pipeline has not."""
    if PipelineInfo.read(pretrained_model_name_or_path, revision).has_two_experts:
        return
    without = f"{pretrained_model_name_or_path}: model_index.json has no `transformer_2`"
    for name in (TRANSFORMER_OPTIONS["low_noise"], LORA_OPTIONS["low_noise"]):
        check(options.get(name) is None, name, options.get(name), f"left out, {without}")
    for path in as_list(options.get(LORA_OPTIONS["high_noise"])):
        if not Path(path).exists():
            continue
        pair = any({*names.values()} <= {each.name for each in Path(path).glob("*")} for names in FILE_NAMES.values())
        is_of_two = pair or _trained_expert(find_lora_weights(path), "high_noise") is not None
        check(not is_of_two, LORA_OPTIONS["high_noise"], path, f"a LoRA of one transformer, not of a pair: {without}")


def _check_is_transformer(path: str, option: str) -> None:
    """Refuse a folder that holds no transformer in diffusers' format, before diffusers tries to read one."""
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "model_index.json").is_file():
        raise ValueError(f"`{option}` '{path}' is a whole pipeline. Give its transformer, '{folder / 'transformer'}'.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"`{option}`: there is no config.json in '{path}'.")
    if read_json(folder / "config.json").get("_class_name") != WanTransformer3DModel.__name__:
        raise ValueError(
            f"`{option}` '{path}' is no transformer in diffusers' format. `hy-prfl convert --transformer {path}` makes one "
            "of Wan's native files."
        )


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
    _check_is_transformer(transformer_path, option)
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


def _warn_of_unnamed_experts(loras: Sequence[tuple[str, Adapter]]) -> None:
    """For a pipeline of two experts whose low-noise expert gets no LoRA: was it forgotten that there are two?"""
    for file, adapter in loras:
        if not adapter.names_expert:
            logger.warning(
                "`%s` '%s' does not say which expert it is for, and goes to the high-noise one only. One for the other "
                "expert is given as `%s`.",
                LORA_OPTIONS["high_noise"],
                file,
                LORA_OPTIONS["low_noise"],
            )


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


def _split_over_processes(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    context_parallel: ContextParallelGroup,
    shard_weights: Sequence[ShardedModel],
    device: torch.device,
) -> None:
    """Split the tokens of the transformers, and the weights of the models that are named, over a group of processes."""
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
    """Put the models where they compute, or have that done when they do."""
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and not (name == "text_encoder" and text_encoder_on_cpu):
                component.to(device)


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
