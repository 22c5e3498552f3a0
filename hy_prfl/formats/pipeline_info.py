"""Properties of a Wan pipeline, read from its `model_index.json` and the configurations of its parts."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from ..configs.base import check
from .layout import EXPERT_FOLDERS
from .sources import reading


LastImage = Literal["none", "optional", "required"]

# Sizes of the published transformers. The values are from the Wan 2.1 and 2.2 repositories
# (`wan/configs/wan_{t2v,i2v,ti2v}_*.py`; FLF2V has those of I2V), the names from diffusers' converter
# (`scripts/convert_wan_to_diffusers.py`). All other entries have the class's defaults.
_T2V_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_T2V_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_I2V_14B = {**_T2V_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_TI2V_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _T2V_1_3B,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _T2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _I2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _I2V_14B,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": {**_I2V_14B, "pos_embed_seq_len": 514},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _T2V_14B,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {**_T2V_14B, "in_channels": 36},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _TI2V_5B,
}
# `boundary_ratio` of the pipelines with a second transformer, which has the same size as the first.
BOUNDARY_RATIOS = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": 0.875, "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 0.9}
# Strides of Wan 2.1's VAE over frames, height and width.
VAE_STRIDE = (4, 8, 8)
# What a plan needs to know of the VAE of published pipelines with another one; Wan 2.1's has the class's defaults.
OTHER_VAES = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": {"is_residual": True, "scale_factor_spatial": 16}}
PIPELINE_CLASSES: dict[str, Any] = {each.__name__: each for each in (WanPipeline, WanImageToVideoPipeline)}


def with_defaults(model_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """
    A value for every argument of a diffusers model class: from `config`, or the class's default.

    This reads the signature and creates no model, not even one without weights. Creating one would draw random numbers,
    for example for Wan's `scale_shift_table`, and so change the numbers of the run that follows.
    """
    parameters = list(inspect.signature(model_class.__init__).parameters.values())[1:]
    return {each.name: config.get(each.name, each.default) for each in parameters}


@dataclass(frozen=True)
class PipelineInfo:
    """
    Properties of a pipeline, without loading it. Configurations of its parts are read when they are first needed.

    Args:
        source (`str`):
            Folder of the pipeline, or its id on the Hub.
        index (`Mapping[str, Any]`):
            Content of its `model_index.json`.
        revision (`str`, *optional*):
            Revision on the Hub.
        transformer_config, vae_config (`Mapping[str, Any]`, *optional*):
            Configurations of its (first) transformer and of its VAE, where they are known. Entries that are missing have
            the class's default. If left out, they are read from `source`.
    """

    source: str
    index: Mapping[str, Any]
    revision: str | None = None
    transformer_config: Mapping[str, Any] | None = None
    vae_config: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, source: str, revision: str | None = None) -> "PipelineInfo":
        """Read the index of a pipeline on disk or on the Hub. Raises a `FileNotFoundError` if there is none."""
        with reading("pretrained_model_name_or_path", source):
            index = DiffusionPipeline.load_config(source, revision=revision)
        return cls(source, index, revision)

    @classmethod
    def of(cls, pipeline: "str | PipelineInfo", revision: str | None = None) -> "PipelineInfo":
        """
        What has been read of a pipeline already, or else [`read`] it.

        Raises:
            ValueError: If a revision is given for a pipeline that was read at another.
        """
        if not isinstance(pipeline, PipelineInfo):
            return cls.read(pipeline, revision)
        is_same = revision in (None, pipeline.revision)
        check(is_same, "revision", revision, f"that of the pipeline that was read, {pipeline.revision}")
        return pipeline

    @classmethod
    def known(cls, source: str, revision: str | None = None) -> "PipelineInfo":
        """Like [`read`], but the published Wan pipelines need no access to the Hub, unless a revision is given."""
        if source not in PUBLISHED or revision is not None or Path(source).exists():
            return cls.read(source, revision)
        ratio, info = BOUNDARY_RATIOS.get(source), cls.from_transformer(source, PUBLISHED[source])
        index = {
            **info.index,
            "transformer_2": None if ratio is None else ["diffusers", "WanTransformer3DModel"],
            "boundary_ratio": ratio,
            "expand_timesteps": source in OTHER_VAES,
        }
        return replace(info, index=index, vae_config=OTHER_VAES.get(source, {}))

    @classmethod
    def from_transformer(cls, source: str, config: Mapping[str, Any], class_name: str | None = None) -> "PipelineInfo":
        """
        What the configuration of a transformer tells of its pipeline: class, images that it takes, sizes.

        Nothing is read. A second transformer is not known of, nor whether a text-to-video pipeline can take a first frame.

        Args:
            source (`str`):
                Name of the pipeline.
            config (`Mapping[str, Any]`):
                Configuration of its transformer, or of a reward model made from it.
            class_name (`str`, *optional*):
                Class of the pipeline. If left out, it is image-to-video if there are more input than output channels.
        """
        full = with_defaults(WanTransformer3DModel, config)
        has_channels = full["in_channels"] > full["out_channels"]
        name = class_name or (WanImageToVideoPipeline if has_channels else WanPipeline).__name__
        # Without channels for the image, it can only be the first frame.
        takes_first_frame = name == WanImageToVideoPipeline.__name__ and not has_channels
        index = {"_class_name": name, "expand_timesteps": takes_first_frame}
        return cls(source, index, transformer_config=config)

    @property
    def pipeline_class(self) -> Any:
        """
        `WanPipeline` or `WanImageToVideoPipeline`.

        Raises:
            ValueError: If it is another class.
        """
        name = self.index["_class_name"]
        if name not in PIPELINE_CLASSES:
            raise ValueError(
                f"`pretrained_model_name_or_path` '{self.source}' is a `{name}`, expected a `WanPipeline` "
                "or a `WanImageToVideoPipeline`."
            )
        return PIPELINE_CLASSES[name]

    @property
    def is_image_to_video(self) -> bool:
        """Whether it is an image-to-video pipeline."""
        return self.pipeline_class is WanImageToVideoPipeline

    @property
    def has_two_experts(self) -> bool:
        """Whether it has a second transformer."""
        second = self.index.get("transformer_2")
        return second is not None and second[0] is not None

    @property
    def boundary_ratio(self) -> float | None:
        """Noise level in (0, 1): the first of two transformers is used at and above it, the second below."""
        return self.index.get("boundary_ratio")

    @property
    def takes_first_frame(self) -> bool:
        """Whether its transformer takes one timestep per token, so that the first frame can be clean (TI2V 5B)."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def last_image(self) -> LastImage:
        """
        Whether it takes a last image: `"none"`, `"optional"` or `"required"`.

        - `"required"` (Wan2.1 FLF2V): the transformer has position embeddings for the tokens of two images.
        - `"none"` (Wan2.1 I2V): it takes the tokens of one image. Or the condition is the first frame of the latents
          (Wan2.2 TI2V 5B). Or it is a text-to-video pipeline.
        - `"optional"` (Wan2.2 A14B): it takes no image tokens, and the condition may contain a last image.
        """
        if not self.is_image_to_video or self.takes_first_frame:
            return "none"
        if self.transformer["image_dim"] is None:
            return "optional"
        return "none" if self.transformer["pos_embed_seq_len"] is None else "required"

    @cached_property
    def transformer(self) -> dict[str, Any]:
        """Configuration of its (first) transformer, with a value for every argument of `WanTransformer3DModel`."""
        config = self.transformer_config
        if config is None:
            folder = EXPERT_FOLDERS["high_noise"]
            config = WanTransformer3DModel.load_config(self.source, subfolder=folder, revision=self.revision)
        return with_defaults(WanTransformer3DModel, config)

    @property
    def vae_stride(self) -> tuple[int, int, int]:
        """Strides of its VAE over frames, height and width."""
        spatial = self._vae["scale_factor_spatial"]
        return self._vae["scale_factor_temporal"], spatial, spatial

    @property
    def has_residual_vae(self) -> bool:
        """Whether its VAE is the residual one of Wan2.2 TI2V 5B."""
        return bool(self._vae["is_residual"])

    @property
    def size_multiple(self) -> int:
        """Number of pixels that divides height and width of its videos: a patch is 2 x 2 pixels of the latents."""
        return 2 * self.vae_stride[1]

    @cached_property
    def _vae(self) -> dict[str, Any]:
        config = self.vae_config
        if config is None:
            config = AutoencoderKLWan.load_config(self.source, subfolder="vae", revision=self.revision)
        return with_defaults(AutoencoderKLWan, config)
