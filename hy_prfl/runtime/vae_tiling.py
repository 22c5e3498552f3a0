"""Decides whether Wan's VAE runs in tiles, from the memory that it would need without them."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import psutil
import torch
from diffusers import AutoencoderKLWan


logger = logging.getLogger(__name__)

VAETiling = Literal["auto", "on", "off"]
Operation = Literal["encode", "decode"]

# Bytes of a float32 pass per pixel, and per pixel and frame, without weights and input. Measured from torch's
# allocations at 480P and 720P, for the VAE of Wan2.1 and A14B (False) and the residual one of TI2V 5B (True). A pass
# processes four frames at a time, so each further frame adds only what is kept of it.
PASS_BYTES: dict[tuple[bool, Operation], tuple[float, float]] = {
    (False, "encode"): (14_095, 0.35),
    (False, "decode"): (19_445, 12.5),
    (True, "encode"): (7_190, 12.2),
    (True, "decode"): (21_530, 12.0),
}
# cuDNN's workspaces, as a share of these bytes. Measured on an H200 (cuDNN 9.19, 81 frames at 480P, Wan2.1's VAE): 0.22
# for encoding and 0.16 for decoding.
CUDNN_SHARE = 0.25


def pass_memory(
    config: Mapping[str, Any], operation: Operation, *, height: int, width: int, num_frames: int, batch_size: int = 1
) -> float:
    """
    Bytes that a float32 pass of the VAE takes without tiles, without weights and input.

    Args:
        config (`Mapping`):
            Configuration of an `AutoencoderKLWan`. Its width is assumed to be that of a published Wan VAE.
        height, width, num_frames (`int`):
            Size of the video in pixels and frames.
    """
    per_pixel, per_frame = PASS_BYTES[bool(config["is_residual"]), operation]
    return batch_size * height * width * (per_pixel + per_frame * num_frames)


def with_workspaces(needed: float, device: torch.device) -> float:
    """Bytes of a pass on this device: on a GPU cuDNN's workspaces come to them."""
    return needed * (1 + CUDNN_SHARE) if device.type == "cuda" else needed


def tiled_decoding_memory(*, height: int, width: int, num_frames: int, batch_size: int = 1) -> float:
    """Bytes that decoding in tiles takes: the larger of one tile, and of all frames while tiles are joined."""
    return batch_size * max(1.4e9, 56.0 * height * width * num_frames)


def free_memory(device: torch.device) -> int:
    """Free bytes of a device, including unused memory that torch has reserved; of the machine's memory on the CPU."""
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
    device: torch.device | None = None,
) -> bool:
    """
    Turn the VAE's tiling on or off for its next pass. Call it just before that pass.

    diffusers' tiles are 256 pixels wide, overlap by a quarter and are blended there, so the result differs slightly.

    Args:
        tiling (`str`):
            `"auto"` uses tiles if the pass does not fit into the free memory of the device.
        device (`torch.device`, *optional*):
            Device of the pass, if the VAE moves there only then.

    Returns:
        `bool`: Whether tiling is on.
    """
    device = vae.device if device is None else device
    needed = pass_memory(
        vae.config, operation, height=height, width=width, num_frames=num_frames, batch_size=batch_size
    )
    needed = with_workspaces(needed, device)
    is_tiled = tiling == "on" or (tiling == "auto" and needed > free_memory(device))
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
