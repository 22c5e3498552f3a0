r"""
Writes one of HY-Video-PRFL's YAML files as one of ours, and says what was not carried over.

    hy-prfl convert --config old.yaml --output new.yaml
"""

import re
import sys
from collections.abc import Sequence

from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.recipe import RecipeConfig
from ..configs.upstream import convert_recipe
from .running import run


def is_about_recipe(argv: Sequence[str]) -> bool:
    """Whether a command line of `convert` is about a recipe: those of checkpoints have an `--output_dir`."""
    return any(word.partition("=")[0] == "--output" for word in argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one recipe."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # What `--config` names here is to be converted; it holds no options of this command.
    renamed = [re.sub(r"^--config(?==|$)", "--recipe", word) for word in argv]
    config = parse_config(RecipeConfig, renamed, description=__doc__)
    check_output_files(config, "output")
    recipe = convert_recipe(config.recipe, config.recipe_command, config.ignore_keys)
    recipe.save(config.output)
    print(f"{recipe.command}, {len(recipe.options)} options: {config.output}")
    for title, lines in (("To be run first:", recipe.first), ("Not carried over, or not as it was:", recipe.notes)):
        if lines:
            print("\n  ".join([title, *lines]))


if __name__ == "__main__":
    run(main)
