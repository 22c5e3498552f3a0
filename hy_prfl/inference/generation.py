"""Prompts to mp4 files with the stock diffusers Wan pipelines. Knows no reward."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from tqdm import tqdm

from ..configs.base import check
from ..data.hashes import hash_file
from ..data.prompts import VideoPrompt
from ..data.video import read_image, resize_and_crop, to_uint8
from ..runtime.atomic_writes import write_text
from ..runtime.context_parallel import ContextParallelGroup
from ..runtime.distributed import from_main_process, process_state
from ..runtime.vae_tiling import VAETiling, set_tiling
from .video_files import MANIFEST, VideoSettings, read_record, write_video


def video_size(prompt: VideoPrompt, settings: VideoSettings, multiple: int = 16) -> tuple[int, int]:
    """
    Height and width of a video in pixels.

    With `image_fit` `"area"`, a side is `sqrt(area * its share of the aspect ratio)`, rounded down to a multiple, as in
    Wan's `image2video.py`: an image of 1000 x 1000 pixels gives 624 x 624 for 480 x 832.

    Args:
        multiple (`int`, defaults to 16):
            Both sides are multiples of this: the side of a latent patch, in pixels.

    Raises:
        ValueError: If the image is so elongated that a side would be shorter than `multiple`.
    """
    if settings.image_fit == "crop" or prompt.image is None:
        return settings.height, settings.width
    image_height, image_width = read_image(prompt.image).shape[:2]
    # Integers: rounding errors of floats would take a patch off a side that is a multiple already.
    area = settings.height * settings.width // multiple**2
    height = multiple * math.isqrt(area * image_height // image_width)
    width = multiple * math.isqrt(area * image_width // image_height)
    if not height or not width:
        raise ValueError(
            f"prompt '{prompt.id}': '{prompt.image}' has {image_width} x {image_height} pixels: with `image_fit` area, a "
            f"side of a video of {settings.width} * {settings.height} pixels would be shorter than {multiple}."
        )
    return height, width


def generate_video(
    pipeline: WanPipeline | WanImageToVideoPipeline, prompt: VideoPrompt, settings: VideoSettings
) -> np.ndarray:
    """
    Sample one video. Its noise comes from a CPU generator of its own, and so depends only on its seed.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`: float32 in [0, 1].
    """
    inputs = pipeline_inputs(prompt, fitted_settings(pipeline, prompt, settings))
    generator = torch.Generator().manual_seed(prompt.seed)
    return pipeline(**inputs, generator=generator, output_type="np").frames[0]


def pipeline_inputs(prompt: VideoPrompt, settings: VideoSettings) -> dict[str, Any]:
    """Arguments of a pipeline for a video, without its noise and the type of its output."""
    images = {
        name: Image.fromarray(resize_and_crop(read_image(path)[None], settings.height, settings.width)[0])
        for name, path in (("image", prompt.image), ("last_image", prompt.last_image))
        if path is not None
    }
    return {
        "prompt": prompt.caption,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "max_sequence_length": settings.max_sequence_length,
        **images,
    }


def fitted_settings(
    pipeline: WanPipeline | WanImageToVideoPipeline, prompt: VideoPrompt, settings: VideoSettings
) -> VideoSettings:
    """Settings with the size of this video, to which its images are then cropped."""
    height, width = video_size(prompt, settings, 2 * pipeline.vae_scale_factor_spatial)
    return replace(settings, height=height, width=width, image_fit="crop")


VideoSampler = Callable[[WanPipeline | WanImageToVideoPipeline, VideoPrompt, VideoSettings], np.ndarray]


def generate_videos(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    prompts: Sequence[VideoPrompt],
    output_dir: str | Path,
    settings: VideoSettings | None = None,
    *,
    model_identity: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    vae_tiling: VAETiling = "auto",
    context_parallel: ContextParallelGroup | None = None,
    sample: VideoSampler = generate_video,
) -> list[Path]:
    """
    Write `<id>_seed_<seed>.mp4` for each prompt, and `manifest.json`, a list that `preprocess` and `score` read.

    Prompts are divided among the processes of `accelerate`, or among its groups of `context_parallel`. Existing videos are
    skipped, so a killed run can be continued. Each file's metadata records how it was made; a file that was made with
    other settings is an error.

    Args:
        settings (`VideoSettings`, *optional*):
            Sampling and file format.
        model_identity (`Mapping`, *optional*):
            Identity of the model, as JSON values. Without it, existing videos of another model are not noticed.
        overwrite (`bool`, defaults to `False`):
            Replace files that were made with other settings.
        vae_tiling (`str`, defaults to `"auto"`):
            Whether the VAE decodes in tiles, see [`~hy_prfl.runtime.vae_tiling.set_tiling`].
        context_parallel (`ContextParallelGroup`, *optional*):
            The group of processes that the pipeline was loaded with. The first of them writes.
        sample (`Callable`, defaults to `generate_video`):
            Makes the frames of one video from the pipeline, the prompt and the settings.

    Returns:
        `list[Path]`: the videos, in the order of the prompts.

    Raises:
        ValueError: If the pipeline cannot make videos of this size, or a file was made with other settings.
    """
    state = process_state()
    output_dir = Path(output_dir)
    settings = VideoSettings() if settings is None else settings
    multiple = 2 * pipeline.vae_scale_factor_spatial
    for name, side in (("height", settings.height), ("width", settings.width)):
        # The pipeline itself would only warn, and make a smaller video.
        check(side % multiple == 0, name, side, f"a multiple of {multiple}, the pixels of a side of a latent patch")
    pending = pending_videos(prompts, output_dir, settings, model_identity=model_identity, overwrite=overwrite)
    # No process writes before all have checked the files, and all divide the same list.
    state.wait_for_everyone()
    pending = from_main_process(pending)
    output_dir.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(leave=False, disable=not state.is_main_process)
    index, num_shares = state.process_index, state.num_processes
    if context_parallel is not None:
        index, num_shares = context_parallel.index, context_parallel.num_groups
    writes = context_parallel is None or context_parallel.is_first_rank
    for prompt in tqdm(pending[index::num_shares], desc="Generating", unit="video", disable=not state.is_main_process):
        fitted = fitted_settings(pipeline, prompt, settings)
        size: dict[str, Any] = {"height": fitted.height, "width": fitted.width, "num_frames": fitted.num_frames}
        # Where the VAE decodes: offloaded models are on the CPU or nowhere between their calls.
        is_tiled = set_tiling(pipeline.vae, vae_tiling, "decode", **size, device=pipeline._execution_device)
        if context_parallel is not None and context_parallel.any(is_tiled):
            # All processes of a video must decode the same frames, even if one of them has less free memory.
            set_tiling(pipeline.vae, "on", "decode", **size)
        frames = sample(pipeline, prompt, fitted)
        if writes:
            record = video_record(prompt, settings, model_identity)
            write_video(
                output_dir / f"{prompt.name}.mp4", frames, settings.fps, crf=settings.crf, comment=json.dumps(record)
            )
    state.wait_for_everyone()
    if state.is_main_process:
        write_manifest(prompts, output_dir)
    state.wait_for_everyone()
    return [output_dir / f"{prompt.name}.mp4" for prompt in prompts]


def pending_videos(
    prompts: Sequence[VideoPrompt],
    output_dir: str | Path,
    settings: VideoSettings,
    *,
    model_identity: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> list[VideoPrompt]:
    """
    Prompts whose video does not exist yet.

    Raises:
        ValueError: If a file was made with other settings, unless `overwrite` is set.
    """
    pending = []
    for prompt in prompts:
        path = Path(output_dir) / f"{prompt.name}.mp4"
        if path.exists():
            expected, found = video_record(prompt, settings, model_identity), read_record(path)
            if found == expected:
                continue
            if not overwrite:
                if not found:
                    raise ValueError(
                        f"'{path}' cannot be read, or is not a video of `generate`. Delete it, choose another "
                        "`output_dir`, or set `overwrite`."
                    )
                different = sorted(key for key in expected | found if expected.get(key) != found.get(key))
                raise ValueError(
                    f"'{path}' was made with other settings ({', '.join(different)}). Choose another `output_dir`, "
                    "or set `overwrite`."
                )
        pending.append(prompt)
    return pending


def write_manifest(prompts: Sequence[VideoPrompt], output_dir: str | Path) -> None:
    """Write `manifest.json`, the list of the videos of these prompts that `preprocess` and `score` read."""
    rows = [
        {"id": prompt.name, "video": f"{prompt.name}.mp4", "caption": prompt.caption, "seed": prompt.seed}
        for prompt in prompts
    ]
    write_text(Path(output_dir) / MANIFEST, json.dumps(rows, indent=1, ensure_ascii=False))


def video_record(
    prompt: VideoPrompt, settings: VideoSettings, model_identity: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Everything that a video depends on, for the metadata of its file.

    `image_fit` is left out if it is `"crop"`, as older videos have no such entry.
    """
    images = {
        name: None if path is None else hash_file(path)
        for name, path in (("image", prompt.image), ("last_image", prompt.last_image))
    }
    values = asdict(settings)
    if settings.image_fit == "crop":
        del values["image_fit"]
    return {"caption": prompt.caption, "seed": prompt.seed, **images, **values, **(model_identity or {})}


@torch.no_grad()
def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor, vae_tiling: VAETiling = "auto") -> np.ndarray:
    """
    Decode normalised latents as the pipelines do.

    Args:
        vae (`AutoencoderKLWan`):
            VAE of the pipeline.
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_latent_frames, height / 8, width / 8)`, or `/ 16`):
            Clean normalised latents.
        vae_tiling (`str`, defaults to `"auto"`):
            Whether the VAE works in tiles, see [`~hy_prfl.runtime.vae_tiling.set_tiling`].

    Returns:
        `np.ndarray` of shape `(batch_size, num_frames, height, width, 3)`: uint8.
    """
    latents = latents.to(vae.device, vae.dtype)
    batch_size, _, num_latent_frames, *sides = latents.shape
    height, width = (side * vae.config.scale_factor_spatial for side in sides)
    num_frames = (num_latent_frames - 1) * vae.config.scale_factor_temporal + 1
    set_tiling(vae, vae_tiling, "decode", height=height, width=width, num_frames=num_frames, batch_size=batch_size)
    shape = (1, -1, 1, 1, 1)
    latents_mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
    latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    video = vae.decode(latents / latents_std + latents_mean, return_dict=False)[0]
    return np.stack([to_uint8(frames) for frames in video.permute(0, 2, 1, 3, 4)])
