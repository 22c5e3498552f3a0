import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.inference.generation import decode_latents
from hy_prfl.planning.estimate import VAE_BYTES
from hy_prfl.planning.simulation import MemoryMeter
from hy_prfl.runtime.vae_tiling import Operation, free_memory, pass_memory, set_tiling, with_workspaces


# The VAE of Wan2.2 TI2V 5B; that of Wan2.1 is diffusers' default.
RESIDUAL = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}  # fmt: skip
SIZE = {"height": 480, "width": 832, "num_frames": 13}


@pytest.mark.parametrize("is_residual", [False, True])
def test_memory_of_a_pass_is_what_torch_allocates(is_residual: bool) -> None:
    with FakeTensorMode():
        vae = AutoencoderKLWan(**(RESIDUAL if is_residual else {})).eval().requires_grad_(False)
        assert sum(parameter.nbytes for parameter in vae.parameters()) == VAE_BYTES[is_residual]
        stride, frames = vae.config.scale_factor_spatial, torch.empty(1, 3, 13, 480, 832)
        latents = torch.empty(1, vae.config.z_dim, 4, 480 // stride, 832 // stride)
        passes = {
            "encode": lambda: vae.encode(frames).latent_dist.mode(),
            "decode": lambda: vae.decode(latents).sample,
        }
        for operation, run in passes.items():
            with torch.no_grad(), MemoryMeter([*vae.parameters(), frames, latents], on_gpu=True) as meter:
                run()
            expected = pass_memory({"is_residual": is_residual}, operation, **SIZE)  # type: ignore[arg-type]
            assert meter.peak == pytest.approx(expected, rel=0.02), operation


@pytest.mark.parametrize(("operation", "measured"), [("encode", 6.89e9), ("decode", 9.46e9)])
def test_memory_of_a_pass_on_a_gpu(operation: Operation, measured: float) -> None:
    """What torch allocated at most on an H200 for 81 frames at 480P, without weights and frames: no less is expected."""
    size = {"height": 480, "width": 832, "num_frames": 81}
    expected = with_workspaces(pass_memory({"is_residual": False}, operation, **size), torch.device("cuda"))
    assert measured <= expected <= 1.1 * measured


def test_tiles_only_where_a_pass_does_not_fit(pipeline_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = AutoencoderKLWan.from_pretrained(pipeline_dir, subfolder="vae")
    small, large = {**SIZE, "height": 32, "width": 32}, {**SIZE, "height": 32_000, "width": 32_000}
    assert pass_memory(vae.config, "decode", **large) > free_memory(vae.device)
    assert [set_tiling(vae, mode, "decode", **small) for mode in ("auto", "on", "off")] == [False, True, False]
    assert not vae.use_tiling
    caplog.set_level(logging.WARNING)
    assert set_tiling(vae, "auto", "decode", **large)
    assert vae.use_tiling
    assert "The VAE works in tiles: to decode 13 x 32000 x 32000 pixels at once takes" in caplog.text
    assert not set_tiling(vae, "off", "decode", **large)


def test_the_device_of_the_pass_is_asked_for_its_memory(pipeline_dir: Path) -> None:
    """Between its calls an offloaded VAE is elsewhere. No GPU is visible here, so it cannot be asked."""
    vae = AutoencoderKLWan.from_pretrained(pipeline_dir, subfolder="vae")
    assert not set_tiling(vae, "auto", "decode", **{**SIZE, "height": 32, "width": 32})
    with pytest.raises((AssertionError, RuntimeError)):
        set_tiling(vae, "auto", "decode", **SIZE, device=torch.device("cuda"))


@pytest.mark.parametrize("kind", ["pipeline_dir", "i2v_pipeline_dir"])
def test_tiles_show_the_same_clip(kind: str, request: pytest.FixtureRequest) -> None:
    """Frames larger than a tile of 256 pixels, encoded and decoded with and without tiles."""
    folder = str(request.getfixturevalue(kind))
    torch.manual_seed(0)
    # A smooth picture: differences are then only near the seams of the tiles.
    frames = torch.nn.functional.interpolate(torch.randn(3, 1, 5, 6, 8), (5, 288, 320), mode="trilinear")[:, 0]
    frames = frames.permute(1, 0, 2, 3).clamp(-1, 1)
    whole, tiled = (LatentEncoder.from_pretrained(folder, vae_tiling=mode) for mode in ("off", "on"))  # type: ignore[arg-type]
    latents, tiled_latents = whole.encode_video(frames), tiled.encode_video(frames)
    assert tiled.pipeline.vae.use_tiling
    assert latents.shape == tiled_latents.shape
    assert not torch.equal(latents, tiled_latents)
    assert (latents - tiled_latents).abs().mean() < 0.05 * latents.abs().mean()
    if whole.is_image_to_video:
        conditions = [encoder.encode_condition(frames)[1] for encoder in (whole, tiled)]
        assert (conditions[0] - conditions[1]).abs().mean() < 0.05 * conditions[0].abs().mean()
    videos = [decode_latents(whole.pipeline.vae, latents[None], mode).astype(int) for mode in ("off", "on")]  # type: ignore[arg-type]
    assert videos[0].shape == (1, 5, 288, 320, 3)
    assert abs(videos[0] - videos[1]).mean() < 3
    assert whole.identity != tiled.identity
