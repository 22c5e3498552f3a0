"""Decides whether a pass of Wan's VAE is made in tiles, from the memory that it needs otherwise."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import psutil
import torch
from diffusers import AutoencoderKLWan


logger = logging.getLogger(__name__)

VAETiling = Literal["auto", "on", "off"]
Operation = Literal["encode", "decode"]

# Bytes of a float32 pass for each pixel, and for each pixel of each frame, besides weights and input, by torch's own
# allocations at 480P and 720P. The VAE of Wan2.1 and A14B, and that of TI2V 5B, which is residual. A pass takes four frames
# at a time, so the number of frames adds only what is kept of each.
PASS_BYTES: dict[tuple[bool, Operation], tuple[float, float]] = {
    (False, "encode"): (14_095, 0.35),
    (False, "decode"): (19_445, 12.5),
    (True, "encode"): (7_190, 12.2),
    (True, "decode"): (21_530, 12.0),
}


def pass_memory(
    config: Mapping[str, Any], operation: Operation, *, height: int, width: int, num_frames: int, batch_size: int = 1
) -> float:
    """
    Bytes that a pass of the VAE takes in float32 without tiles, besides its weights and its input.

    Args:
        config (`Mapping`):
            Configuration of an `AutoencoderKLWan`, assumed to have the width of a published Wan VAE.
        height, width, num_frames (`int`):
            Size of the video in pixels and frames.
    """
    per_pixel, per_frame = PASS_BYTES[bool(config["is_residual"]), operation]
    return batch_size * height * width * (per_pixel + per_frame * num_frames)


def tiled_decoding_memory(*, height: int, width: int, num_frames: int, batch_size: int = 1) -> float:
    """Bytes of decoding in tiles: of one tile, or of all frames while they are joined."""
    return batch_size * max(1.4e9, 56.0 * height * width * num_frames)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, with those that torch has reserved; on the CPU those of the machine."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def set_tiling(
    vae: AutoencoderKLWan,
    tiling: VAETiling,
    operation: Operation,
    *,
    height: int,
    width: int,
    num_frames: int,
    batch_size: int = 1,
) -> bool:
    """
    Let the VAE make its next pass in tiles, or not; call it just before that pass.

    diffusers' tiles are 256 pixels wide and overlap by a quarter, where they are blended, so the result differs
    slightly.

    Args:
        tiling (`str`):
            `"auto"` uses tiles if the pass does not fit into the free memory of the VAE's device.

    Returns:
        `bool`: Whether there will be tiles.
    """
    needed = pass_memory(
        vae.config, operation, height=height, width=width, num_frames=num_frames, batch_size=batch_size
    )
    is_tiled = tiling == "on" or (tiling == "auto" and needed > free_memory(vae.device))
    if is_tiled and not vae.use_tiling:
        logger.warning(
            "The VAE works in tiles: to %s %d x %d x %d pixels at once takes %.1f GB (`vae_tiling` %s).",
            operation, num_frames, height, width, needed / 1e9, tiling,
        )  # fmt: skip
    if is_tiled:
        vae.enable_tiling()
    else:
        vae.disable_tiling()
    return is_tiled
