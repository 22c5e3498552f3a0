"""Options of `convert` for a YAML file of HY-Video-PRFL's."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


@dataclass(kw_only=True)
class RecipeConfig(Config):
    """Options of `convert --config old.yaml --output new.yaml`."""

    recipe: str = field(metadata={"help": "YAML file of HY-Video-PRFL's; on the command line `--config` will do."})
    output: str = field(metadata={"help": "YAML file to write, which must not exist."})
    recipe_command: Literal["preprocess", "train_reward", "train_prfl", "score"] | None = field(
        default=None, metadata={"help": "What the recipe is for; told by its keys and its name if left out."}
    )
    ignore_keys: list[str] = field(
        default_factory=list,
        metadata={"help": "Keys, as section.key, that may be left out although nothing is known about them."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.output.endswith((".yaml", ".yml")), "output", self.output, "a .yaml file")
