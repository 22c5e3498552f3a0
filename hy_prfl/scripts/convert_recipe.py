r"""
Writes one of HY-Video-PRFL's YAML files as one of ours, says what was not carried over, and what to run.

    hy-prfl convert_recipe --config HY-Video-PRFL/configs/train_pavrm_t2v_480.yaml --output ours.yaml

Here `--config` is upstream's file. The commands that are printed, and written into the head of the new file, are for the
folder that this is run in. Every key and flag of upstream's has a line in docs/upstream.md.
"""

import re
import sys
from collections.abc import Sequence

from ..configs.inputs import check_sources
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.recipe import RecipeConfig
from ..formats.converted_recipe import TABLE
from ..formats.upstream_recipe import convert_recipe
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one recipe."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # What `--config` names here is to be converted; it holds no options of this command.
    renamed = [re.sub(r"^--config(?==|$)", "--recipe", word) for word in argv]
    config = parse_config(RecipeConfig, renamed, description=__doc__)
    check_output_files(config, "output")
    check_sources(config, "pretrained_model_name_or_path")
    recipe = convert_recipe(
        config.recipe,
        config.recipe_command,
        config.ignore_keys,
        config.pretrained_model_name_or_path,
        config.upstream_root,
    )
    recipe.save(config.output)
    print(f"{recipe.command}, {len(recipe.options)} options: {config.output}")
    print("\n  ".join(["Not carried over, or not as it was:", *recipe.notes]))
    print(f"Every key and flag of upstream's: {TABLE}")
    plan = recipe.plan(config.output)
    if plan is not None:
        print(f"Memory and time beforehand:\n  {plan}")
    print("\n  ".join(["To be run in this folder, in this order:", *recipe.commands(config.output)]))


if __name__ == "__main__":
    run(main)
