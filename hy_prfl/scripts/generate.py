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


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the videos that are not there yet."""
    config = parse_config(GenerateConfig, argv, description=__doc__)
    check_files(config, "prompts")
    check_sources(config, "pretrained_model_name_or_path", "transformer_path", "transformer_2_path")
    check_sources(config, "lora_path", "lora_2_path", or_file=True)
    check_output_folders(config, "output_dir")

    # Only now, so that nobody waits for torch to hear of a misspelt option.
    import torch

    from ..data.prompts import check_prompts, read_prompts
    from ..formats.pipeline_info import PipelineInfo
    from ..inference.generation import VideoSettings, generate_videos, pending_videos, write_manifest
    from ..inference.pipelines import LORA_OPTIONS, check_options_fit, find_lora_weights, load_pipeline
    from ..runtime.distributed import process_state, set_up_logging
    from ..runtime.provenance import path_identity

    set_up_logging()
    state = process_state()
    output_dir = Path(config.output_dir)
    prompts = read_prompts(config.prompts, seed=config.seed, num_videos_per_prompt=config.num_videos_per_prompt)
    location = (config.pretrained_model_name_or_path, config.revision)
    info = PipelineInfo.read(*location)
    check_prompts(prompts, image_to_video=info.is_image_to_video, last_image=info.last_image)

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
        generate_videos(
            pipeline,
            prompts,
            output_dir,
            settings,
            model_identity=identity,
            overwrite=config.overwrite,
            vae_tiling=config.vae_tiling,
        )
    if state.is_main_process:
        write_manifest(prompts, output_dir)
        save_config(config, output_dir / "generate.yaml")
        print(f"{len(pending)} videos generated, {len(prompts) - len(pending)} were there: {output_dir}")


if __name__ == "__main__":
    run(main)
