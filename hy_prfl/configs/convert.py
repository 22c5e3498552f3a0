"""Options of `convert`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


# Option that names the input -> formats that it can be written in.
OUTPUT_FORMATS = {
    "transformer": ("diffusers", "native"),
    "lora": ("diffusers", "comfyui", "kohya", "upstream"),
    "reward_model": ("upstream",),
    "reward_transformer": ("diffusers",),
}
REWARD_PARTS = ("reward_transformer", "mlp", "query_attention")


@dataclass(kw_only=True)
class ConvertConfig(Config):
    """
    Options of `convert`. One call converts a generator, a LoRA, or a reward model.

    > Parameters of the output
    > Parameters of the generator
    > Parameters of the LoRA
    > Parameters of the reward model
    """

    # Parameters of the output
    output_dir: str = field(metadata={"help": "New folder for the result."})
    output_format: Literal["diffusers", "native", "comfyui", "kohya", "upstream"] = field(
        default="diffusers",
        metadata={
            "help": "Format of the result. Generator: diffusers, or native for Wan's and upstream's inference and "
            "ComfyUI. LoRA: diffusers, comfyui, kohya, or upstream (its three files). Reward model: diffusers from "
            "upstream's three parts, upstream from `reward_model`."
        },
    )

    # Parameters of the generator
    transformer: str | None = field(
        default=None,
        metadata={
            "help": "Generator in Wan's native or diffusers' format: a folder with config.json and safetensors (one "
            "file or shards), or a file (safetensors, pt, pth, ckpt, bin). With `merge_lora` it may also be the folder of a "
            "whole pipeline; only its transformers are read."
        },
    )
    merge_lora: list[str] | None = field(
        default=None,
        metadata={
            "help": "LoRAs to merge into `transformer`, one or several, in any format that `lora` takes. In a pipeline with "
            "two experts, each is merged into the expert that its header names."
        },
    )
    merge_lora_scale: list[float] | None = field(
        default=None, metadata={"help": "Strength of each LoRA in `merge_lora`, or one number for all; 1 if left out."}
    )
    transformer_config: str | None = field(
        default=None, metadata={"help": "config.json for a single file, if it is not in the same folder."}
    )
    max_shard_size: str | None = field(
        default=None,
        metadata={
            "help": "Largest size of a weight file, e.g. 5GB. If left out: one file (native), 10GB (diffusers)."
        },
    )
    text_len: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that native code pads a prompt to, not stored in diffusers' files. 512 if left out."
        },
    )

    # Parameters of the LoRA
    lora: str | None = field(
        default=None,
        metadata={
            "help": "LoRA of diffusers, peft, ComfyUI, kohya, DiffSynth, VideoX-Fun or upstream, recognised by its keys: a "
            "file, or a folder of diffusers, peft or upstream. If a folder has one for each expert, both are converted."
        },
    )

    # Parameters of the reward model
    reward_model: str | None = field(
        default=None, metadata={"help": "Reward model of this package, to write as upstream's three parts."}
    )
    reward_transformer: str | None = field(
        default=None, metadata={"help": "Upstream reward model: folder of its transformer, `checkpoint-N`."}
    )
    mlp: str | None = field(default=None, metadata={"help": "Upstream reward model: `mlp_step_N.ckpt`."})
    query_attention: str | None = field(
        default=None, metadata={"help": "Upstream reward model: `query_attention_step_N.ckpt`."}
    )
    num_query_heads: int = field(
        default=8, metadata={"help": "Heads of the query attention, not stored in upstream's files. Its code has 8."}
    )
    query_residual: bool = field(
        default=True, metadata={"help": "Whether the query is added to the pooled vector, as in upstream's code."}
    )
    task: Literal["text_alignment", "blur_quality", "physics_quality", "human_quality", "motion_quality"] = field(
        default="motion_quality", metadata={"help": "Label that the reward model was trained on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self._kind()
        formats = OUTPUT_FORMATS[kind]
        check(
            self.output_format in formats, "output_format", self.output_format, f"{' or '.join(formats)} with `{kind}`"
        )
        for name in ("transformer_config", "max_shard_size", "text_len", "merge_lora", "merge_lora_scale"):
            value = getattr(self, name)
            check(value is None or kind == "transformer", name, value, "left out without `transformer`")
        check(
            self.text_len is None or (self.text_len >= 1 and self.output_format == "native"),
            "text_len",
            self.text_len,
            "at least 1, and left out unless `output_format` is native",
        )
        check(
            self.max_shard_size is None or re.fullmatch(r"[1-9]\d*[KMGT]B", self.max_shard_size) is not None,
            "max_shard_size",
            self.max_shard_size,
            "a number with KB, MB, GB or TB, such as 5GB",
        )
        scales, num_loras = self.merge_lora_scale, len(self.merge_lora or [])
        check(self.merge_lora is None or num_loras > 0, "merge_lora", self.merge_lora, "not empty, or left out")
        check(num_loras > 0 or scales is None, "merge_lora_scale", scales, "left out without `merge_lora`")
        fits = scales is None or len(scales) in (1, num_loras)
        check(fits, "merge_lora_scale", scales, f"one number, or {num_loras}, one for each of `merge_lora`")
        check(self.num_query_heads >= 1, "num_query_heads", self.num_query_heads, "at least 1")

    def _kind(self) -> str:
        """The key of `OUTPUT_FORMATS` for the given options; the three parts of a reward model count as one."""
        names = dict.fromkeys((*OUTPUT_FORMATS, *REWARD_PARTS))
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            raise ValueError(
                "Give `transformer`, `lora`, `reward_model`, or `reward_transformer` with `mlp` and `query_attention`."
            )
        if given[0] in REWARD_PARTS:
            for name in REWARD_PARTS:
                value = getattr(self, name)
                check(value is not None, name, value, f"given together with `{given[0]}`")
            return "reward_transformer"
        for name in given[1:]:
            check(False, name, getattr(self, name), f"left out with `{given[0]}`")
        return given[0]
