r"""
Generates videos from a list of prompts.

    accelerate launch -m hy_prfl.scripts.generate --prompts prompts.json --output_dir outputs/videos \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora_path outputs/prfl

Run the same command again to continue after a stop. With `--context_parallel_degree N`, N processes make one video together.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.base import check
from ..configs.generate import NEGATIVE_PROMPTS, GenerateConfig
from ..configs.inputs import check_files, check_sources
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from .running import run


if TYPE_CHECKING:
    from ..formats.pipeline_info import PipelineInfo

# Options that a video depends on, besides its prompt and `VideoSettings`.
MODEL_OPTIONS = ("lora_scale", "dtype", "flow_shift", "step_cache", "step_cache_threshold", "step_cache_interval")
MODEL_PATHS = ("pretrained_model_name_or_path", "transformer_path", "lora_path")
# These are in the record of a video only if they are given, so that records of older versions stay valid.
EXPERT_PATHS = ("transformer_2_path", "lora_2_path")
NEWER_OPTIONS = ("sample_solver", "lora_weights", "lora_2_weights", "attention_backend")
# File in `output_dir` with the options of the last run.
CONFIG_FILE = "generate.yaml"
# Random seeds are drawn from 0 to this, exclusive.
NUM_SEEDS = 2**32
CANDIDATE_OPTIONS = (
    "num_candidates",
    "keep",
    "candidate_batch_size",
    "final_timesteps",
    "resample",
    "renoise",
    "reward_guidance",
    "reward_guidance_steps",
    "reward_model_revision",
    "reward_dtype",
    "calibrate",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the videos that do not exist yet."""
    config = parse_config(GenerateConfig, argv, description=__doc__)
    check_files(config, "prompts")
    check_sources(config, "pretrained_model_name_or_path", "transformer_path", "transformer_2_path")
    check_sources(config, "reward_model")
    check_sources(config, "lora_path", "lora_2_path", or_file=True)
    check_output_folders(config, "output_dir")

    # Imported here, so that a misspelt option is reported before torch is loaded.
    import torch

    from ..data.prompts import check_prompts, read_prompts
    from ..formats.pipeline_info import PipelineInfo
    from ..inference import candidate_files
    from ..inference.generation import generate_video, generate_videos, pending_videos, video_size, write_manifest
    from ..inference.pipelines import load_pipeline
    from ..inference.video_files import VideoSettings
    from ..models.loading import load_reward_model
    from ..runtime.context_parallel import ContextParallelGroup
    from ..runtime.distributed import SHARED_WORK_TIMEOUT, from_main_process, process_state
    from ..runtime.messages import set_up_logging
    from ..runtime.provenance import path_identity, save_config

    set_up_logging()
    state = process_state()
    output_dir, degree = Path(config.output_dir), config.context_parallel_degree
    fits = state.num_processes % degree == 0
    check(fits, "context_parallel_degree", degree, f"a divisor of the number of processes, {state.num_processes}")
    if config.random_seed:
        seed = from_main_process(find_seed(output_dir))
        config = dataclasses.replace(config, seed=seed, random_seed=False)
    else:
        check_seed_is_kept(config, output_dir)
    prompts = read_prompts(config.prompts, seed=config.seed or 0, num_videos_per_prompt=config.num_videos_per_prompt)
    info = PipelineInfo.read(config.pretrained_model_name_or_path, config.revision)
    check_prompts(prompts, image_to_video=info.is_image_to_video, last_image=info.last_image)
    fits = info.is_image_to_video or config.image_fit == "crop"
    check(fits, "image_fit", config.image_fit, "crop for a text-to-video pipeline, which takes no images")

    settings = VideoSettings(**{name: getattr(config, name) for name in VideoSettings.__dataclass_fields__})
    negative = NEGATIVE_PROMPTS.get(config.negative_prompt or "", config.negative_prompt)
    settings = dataclasses.replace(settings, negative_prompt=negative)
    identity = model_identity(config, info)
    if config.reward_model is not None:
        candidate_files.check_seeds(prompts, config.num_candidates)
        candidate_files.check_reward_model(config, info)
        identity |= {name: getattr(config, name) for name in CANDIDATE_OPTIONS}
        identity["reward_model"] = path_identity(config.reward_model)
    pending = from_main_process(
        pending_videos(prompts, output_dir, settings, model_identity=identity, overwrite=config.overwrite)
    )
    if pending:
        sizes = {video_size(prompt, settings, info.size_multiple) for prompt in pending}
        check_processes(config, info, sizes)
        context_parallel = (
            ContextParallelGroup(degree, SHARED_WORK_TIMEOUT, config.ring_degree) if degree > 1 else None
        )
        pipeline = load_pipeline(
            info,
            variant=config.variant,
            transformer_path=config.transformer_path,
            transformer_2_path=config.transformer_2_path,
            lora_path=config.lora_path,
            lora_2_path=config.lora_2_path,
            lora_weights=config.lora_weights,
            lora_2_weights=config.lora_2_weights,
            lora_scale=1.0 if config.lora_scale is None else config.lora_scale,
            sample_solver=config.sample_solver,
            flow_shift=config.flow_shift,
            dtype=getattr(torch, config.dtype),
            device=state.device,
            cpu_offload=config.cpu_offload,
            text_encoder_on_cpu=config.text_encoder_on_cpu,
            context_parallel=context_parallel,
            shard_weights=config.shard_weights or (),
            attention_backend=config.attention_backend,
            step_cache=config.step_cache,
            step_cache_threshold=config.step_cache_threshold,
            step_cache_interval=config.step_cache_interval,
        )
        if state.is_main_process:
            # Before the first video, so that a killed run finds its random seed again.
            output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, output_dir / CONFIG_FILE)
        sample = generate_video
        if config.reward_model is not None:
            reward_model = load_reward_model(
                config.reward_model,
                revision=config.reward_model_revision,
                dtype=getattr(torch, config.reward_dtype or config.dtype),
            )
            if config.cpu_offload == "none":
                reward_model.to(state.device)
            settings_of_candidates = candidate_files.candidate_settings(config)
            sample = candidate_files.CandidateSampler(
                reward_model, config.num_candidates, settings_of_candidates, output_dir
            )
        generate_videos(
            pipeline,
            prompts,
            output_dir,
            settings,
            model_identity=identity,
            overwrite=config.overwrite,
            vae_tiling=config.vae_tiling,
            context_parallel=context_parallel,
            sample=sample,
        )
    if state.is_main_process:
        write_manifest(prompts, output_dir)
        save_config(config, output_dir / CONFIG_FILE)
        if config.reward_model is not None:
            candidate_files.write_table(output_dir, prompts)
        if config.calibrate:
            found = candidate_files.write_calibration(output_dir, prompts, config, info)
            schedule = "best-of-N, without --keep," if found["keep"] is None else f"--keep {found['keep']}"
            print(
                f"{schedule} keeps {found['share']:.0%} of the gain of best of {config.num_candidates}, at "
                f"{found['cost']:.2f} times the cost of a plain sample ({output_dir / candidate_files.CALIBRATION})"
            )
        print(f"{len(pending)} videos generated, {len(prompts) - len(pending)} were there already: {output_dir}")


def model_identity(config: GenerateConfig, info: "PipelineInfo") -> dict[str, Any]:
    """
    Everything that a video depends on besides its prompt and its settings, for its record.

    Raises:
        ValueError, FileNotFoundError: If a LoRA does not exist, or an option is for an expert that the pipeline does not
            have.
    """
    from ..inference.pipeline_loras import LORA_OPTIONS, as_list, check_options_fit, find_lora_weights
    from ..runtime.provenance import path_identity

    identity = {name: getattr(config, name) for name in (*MODEL_OPTIONS, "revision", "variant")}
    identity |= {name: getattr(config, name) for name in NEWER_OPTIONS if getattr(config, name) is not None}
    paths = {name: getattr(config, name) for name in MODEL_PATHS}
    paths |= {name: getattr(config, name) for name in EXPERT_PATHS if getattr(config, name) is not None}
    check_options_fit(info, paths)
    for expert, option in LORA_OPTIONS.items():
        # Identify the weight file itself: a training run's folder holds other files, which keep changing.
        found = [find_lora_weights(path, expert) for path in as_list(paths.get(option))]
        if found:
            # A single LoRA is not in a list, as in records of older versions.
            paths[option] = found[0] if len(found) == 1 else found
    return identity | {
        name: [path_identity(each) for each in path] if isinstance(path, list) else path and path_identity(path)
        for name, path in paths.items()
    }


def check_processes(config: GenerateConfig, info: "PipelineInfo", sizes: set[tuple[int, int]]) -> None:
    """
    Refuse an attention kernel that does not work on this machine, and video sizes that the processes cannot divide evenly.

    Args:
        sizes (`set[tuple[int, int]]`):
            Height and width of the videos in pixels.
    """
    import torch

    from ..inference.video_sizes import check_split_fits
    from ..runtime.attention import check_attention_backend
    from ..runtime.distributed import process_state

    if config.context_parallel_degree > 1:
        check_split_fits(
            info,
            config.context_parallel_degree,
            {(config.num_frames, *size) for size in sizes},
            ring_degree=config.ring_degree,
            transformer_path=config.transformer_path,
            transformer_2_path=config.transformer_2_path,
        )
    if config.attention_backend is not None:
        device, dtype = process_state().device, getattr(torch, config.dtype)
        check_attention_backend(
            config.attention_backend, option="attention_backend", trains=False, device=device, dtype=dtype
        )


def options_before(output_dir: Path) -> GenerateConfig | None:
    """Options of the last run that wrote into a folder. None if there was none."""
    path = output_dir / CONFIG_FILE
    return parse_config(GenerateConfig, ["--config", str(path)]) if path.exists() else None


def find_seed(output_dir: Path) -> int:
    """
    A random base seed: the one that the videos of a folder already have, or else a new one.

    Raises:
        ValueError: If the folder's `generate.yaml` is from a run with the default seed.
    """
    before = options_before(output_dir)
    if before is None:
        return secrets.randbelow(NUM_SEEDS)
    if before.seed is None:
        raise ValueError(
            f"`random_seed`: {output_dir / CONFIG_FILE} is from a run with the default seed 0. Choose another `output_dir`."
        )
    return before.seed


def check_seed_is_kept(config: GenerateConfig, output_dir: Path) -> None:
    """
    Refuse to continue with the default seed in a folder whose videos have another seed, such as a random one.

    Raises:
        ValueError: If the folder's videos have another seed. The message names it.
    """
    if config.seed is not None or config.overwrite:
        return
    before = options_before(output_dir)
    if before is not None and before.seed is not None:
        raise ValueError(
            f"`seed`: {output_dir / CONFIG_FILE} is from a run with the seed {before.seed}. Give `--seed {before.seed}`, or "
            "`--random_seed` if the seed was random, or choose another `output_dir`."
        )


if __name__ == "__main__":
    run(main)
