"""Options of `convert_recipe`."""

from dataclasses import dataclass, field
from typing import Literal

from .base import Config, check


@dataclass(kw_only=True)
class RecipeConfig(Config):
    """Options of `convert_recipe --config theirs.yaml --output ours.yaml`."""

    recipe: str = field(metadata={"help": "YAML file of HY-Video-PRFL. On the command line also `--config`."})
    output: str = field(metadata={"help": "YAML file to write. It must not exist."})
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pipeline in diffusers' format, a folder or a Hub id. If left out, the published one of the recipe's model."
        },
    )
    upstream_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which upstream ran: relative paths in the recipe start there. If left out, the folder above "
            "`configs` if the recipe is in a folder of that name, else the current one."
        },
    )
    recipe_command: Literal["preprocess", "train_reward", "train_prfl", "score"] | None = field(
        default=None,
        metadata={"help": "Command that the recipe is for; inferred from its keys and its name if left out."},
    )
    ignore_keys: list[str] = field(
        default_factory=list,
        metadata={"help": "Keys to ignore, as section.key, for example because their values are refused."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.output.endswith((".yaml", ".yml")), "output", self.output, "a .yaml file")
