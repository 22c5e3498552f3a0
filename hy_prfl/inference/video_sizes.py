"""Which sizes of video a pipeline can make, from its configuration alone."""

from collections.abc import Iterable

from diffusers import WanTransformer3DModel

from ..formats.layout import EXPERT_FOLDERS, ExpertName
from ..formats.pipeline_info import PipelineInfo
from ..runtime.context_parallel import check_divisible


def check_split_fits(
    info: PipelineInfo,
    degree: int,
    shapes: Iterable[tuple[int, int, int]],
    *,
    ring_degree: int = 1,
    transformer_path: str | None = None,
    transformer_2_path: str | None = None,
) -> None:
    """
    Refuse videos whose tokens, or transformers whose heads, cannot be divided among the processes of a video.

    Args:
        info (`PipelineInfo`):
            The pipeline.
        degree (`int`):
            Processes that make a video together.
        ring_degree (`int`, defaults to 1):
            Degree of ring attention; heads need to be divisible by `degree / ring_degree` only.
        shapes (`Iterable[tuple[int, int, int]]`):
            Frames, height and width of the videos in pixels.

    Raises:
        ValueError: If they cannot; names the shape of the latents, or the heads, and the degrees that would fit.
    """
    stride, num_channels = info.vae_stride, info.transformer["out_channels"]
    latents = [
        (num_channels, (num_frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])
        for num_frames, height, width in shapes
    ]
    tuned: dict[ExpertName, str | None] = {"high_noise": transformer_path, "low_noise": transformer_2_path}
    if not info.has_two_experts:
        del tuned["low_noise"]
    for expert, replacement in tuned.items():
        own = (info.source, EXPERT_FOLDERS[expert], info.revision)
        model = own if replacement is None else (replacement, None, None)
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
