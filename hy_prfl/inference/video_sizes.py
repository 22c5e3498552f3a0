"""Which sizes of video a pipeline can make, from its configuration alone."""

from collections.abc import Iterable
from typing import Any

from diffusers import AutoencoderKLWan, WanTransformer3DModel

from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.pipeline_info import PipelineInfo
from ..runtime.context_parallel import check_divisible


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
    Refuse videos whose tokens, or transformers whose heads, cannot be divided among the processes of a video.

    Args:
        degree (`int`):
            Processes that make a video together.
        ring_degree (`int`, defaults to 1):
            Degree of ring attention; heads need to be divisible by `degree / ring_degree` only.
        shapes (`Iterable[tuple[int, int, int]]`):
            Frames, height and width of the videos in pixels.

    Raises:
        ValueError: If they cannot; names the shape of the latents, or the heads, and the degrees that would fit.
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
    """Number of pixels that divides height and width of a pipeline's videos, by its configuration."""
    return 2 * int(_vae_config(pretrained_model_name_or_path, revision)["scale_factor_spatial"])


def _vae_config(path: str, revision: str | None) -> dict[str, Any]:
    """Configuration of a pipeline's VAE, with the values that Wan2.1's leaves out."""
    config = AutoencoderKLWan.load_config(path, subfolder="vae", revision=revision)
    return {"scale_factor_spatial": 8, "scale_factor_temporal": 4, "z_dim": 16, **config}
