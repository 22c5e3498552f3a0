r"""
Generates videos from a list of prompts.

    accelerate launch -m hy_prfl.scripts.generate --prompts prompts.json --output_dir outputs/videos \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora_path outputs/prfl/lora

The same command again goes on where it was stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from ..configs.base import save_config
from ..configs.generate import GenerateConfig
from ..configs.inputs import check_files, check_sources
from ..configs.outputs import check_output_folders
from ..configs.parser import parse_config
from .running import run


# Options that a video depends on and that neither its prompt nor `VideoSettings` tells.
MODEL_OPTIONS = ("lora_scale", "dtype", "flow_shift", "step_cache", "step_cache_threshold", "step_cache_interval")
MODEL_PATHS = ("pretrained_model_name_or_path", "transformer_path", "lora_path")
# In the record of a video only where they are given, so that older videos count as what they are.
EXPERT_PATHS = ("transformer_2_path", "lora_2_path")
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
    """Generate the videos that are not there yet."""
    config = parse_config(GenerateConfig, argv, description=__doc__)
    check_files(config, "prompts")
    check_sources(config, "pretrained_model_name_or_path", "transformer_path", "transformer_2_path")
    check_sources(config, "reward_model")
    check_sources(config, "lora_path", "lora_2_path", or_file=True)
    check_output_folders(config, "output_dir")

    # Only now, so that nobody waits for torch to hear of a misspelt option.
    import torch
    from diffusers import WanImageToVideoPipeline

    from ..data.encoding import find_pipeline_class, last_image_support
    from ..data.prompts import check_prompts, read_prompts
    from ..inference import candidate_files
    from ..inference.generation import VideoSettings, generate_video, generate_videos, pending_videos, write_manifest
    from ..inference.pipelines import LORA_OPTIONS, check_options_fit, find_lora_weights, load_pipeline
    from ..models.loading import load_reward_model
    from ..runtime.distributed import process_state, set_up_logging
    from ..runtime.provenance import path_identity

    set_up_logging()
    state = process_state()
    output_dir = Path(config.output_dir)
    prompts = read_prompts(config.prompts, seed=config.seed, num_videos_per_prompt=config.num_videos_per_prompt)
    location = (config.pretrained_model_name_or_path, config.revision)
    image_to_video = find_pipeline_class(*location) is WanImageToVideoPipeline
    last_image = last_image_support(*location) if image_to_video else "none"
    check_prompts(prompts, image_to_video=image_to_video, last_image=last_image)

    settings = VideoSettings(**{name: getattr(config, name) for name in VideoSettings.__dataclass_fields__})
    identity = {name: getattr(config, name) for name in (*MODEL_OPTIONS, "revision", "variant")}
    paths = {name: getattr(config, name) for name in MODEL_PATHS}
    paths |= {name: getattr(config, name) for name in EXPERT_PATHS if getattr(config, name) is not None}
    check_options_fit(location[0], paths, revision=config.revision)
    for expert, option in LORA_OPTIONS.items():
        if paths.get(option) is not None:
            # The folder of a training run holds more than the weights, and goes on changing.
            paths[option] = find_lora_weights(paths[option], expert)
    identity |= {name: None if path is None else path_identity(path) for name, path in paths.items()}
    if config.reward_model is not None:
        candidate_files.check_seeds(prompts, config.num_candidates)
        candidate_files.check_reward_model(config)
        identity |= {name: getattr(config, name) for name in CANDIDATE_OPTIONS}
        identity["reward_model"] = path_identity(config.reward_model)
    pending = pending_videos(prompts, output_dir, settings, model_identity=identity, overwrite=config.overwrite)
    if pending:
        pipeline = load_pipeline(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            transformer_path=config.transformer_path,
            transformer_2_path=config.transformer_2_path,
            lora_path=config.lora_path,
            lora_2_path=config.lora_2_path,
            lora_scale=1.0 if config.lora_scale is None else config.lora_scale,
            flow_shift=config.flow_shift,
            dtype=getattr(torch, config.dtype),
            device=state.device,
            cpu_offload=config.cpu_offload,
            step_cache=config.step_cache,
            step_cache_threshold=config.step_cache_threshold,
            step_cache_interval=config.step_cache_interval,
        )
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
            sample=sample,
        )
    if state.is_main_process:
        write_manifest(prompts, output_dir)
        save_config(config, output_dir / "generate.yaml")
        if config.reward_model is not None:
            candidate_files.write_table(output_dir, prompts)
        if config.calibrate:
            found = candidate_files.write_calibration(output_dir, prompts, config)
            print(
                f"--keep {found['keep']} keeps {found['share']:.0%} of the gain of best of {config.num_candidates}, for "
                f"{found['cost']:.2f} times the cost of a plain sample ({output_dir / candidate_files.CALIBRATION})"
            )
        print(f"{len(pending)} videos generated, {len(prompts) - len(pending)} were there: {output_dir}")


if __name__ == "__main__":
    run(main)
