"""Options of `convert`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import check


@dataclass(kw_only=True)
class ConvertConfig:
    """
    Options of `convert`: either the three parts of an upstream reward model, or a native Wan transformer.

    > Parameters of the reward model
    > Parameters of the generator
    """

    output_dir: str = field(metadata={"help": "New folder for the converted model."})

    # Parameters of the reward model
    reward_transformer: str | None = field(
        default=None, metadata={"help": "Upstream reward model: folder of its transformer, `checkpoint-N`."}
    )
    mlp: str | None = field(default=None, metadata={"help": "Upstream reward model: `mlp_step_N.ckpt`."})
    query_attention: str | None = field(
        default=None, metadata={"help": "Upstream reward model: `query_attention_step_N.ckpt`."}
    )
    num_query_heads: int = field(
        default=8, metadata={"help": "Heads of the query attention, which no file tells; upstream's code has 8."}
    )
    query_residual: bool = field(
        default=True, metadata={"help": "The query is added to the pooled vector, as upstream's code does."}
    )
    task: Literal["text_alignment", "blur_quality", "physics_quality", "human_quality", "motion_quality"] = field(
        default="motion_quality", metadata={"help": "Label that the reward model was trained on."}
    )

    # Parameters of the generator
    transformer: str | None = field(
        default=None,
        metadata={"help": "Folder of a generator in Wan's native format (config.json, one safetensors or shards)."},
    )

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in ("reward_transformer", "mlp", "query_attention")}
        given = [name for name, value in parts.items() if value is not None]
        if self.transformer is not None:
            check(
                not given, given[0] if given else "", parts[given[0]] if given else "", "left out with `transformer`"
            )
            return
        if not given:
            raise ValueError("Give `transformer`, or `reward_transformer` with `mlp` and `query_attention`.")
        for name, value in parts.items():
            check(value is not None, name, value, f"given together with `{given[0]}`")
        check(self.num_query_heads >= 1, "num_query_heads", self.num_query_heads, "at least 1")
