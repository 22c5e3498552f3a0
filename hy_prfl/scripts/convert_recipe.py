r"""
Converts a YAML file of HY-Video-PRFL to one of this package, and prints what was not carried over and which commands to run.

    hy-prfl convert_recipe --config HY-Video-PRFL/configs/train_pavrm_t2v_480.yaml --output ours.yaml

Here `--config` is upstream's file. The commands are printed, and written into the first lines of the new file. Run them in
the current folder. docs/upstream.md has a line for each of upstream's keys and flags.
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
    # Here `--config` names the file to convert. It does not hold options of this command.
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
    print("\n  ".join(["Not carried over, or changed:", *recipe.notes]))
    print(f"All of upstream's keys and flags: {TABLE}")
    plan = recipe.plan(config.output)
    if plan is not None:
        print(f"Estimate memory and time before you start:\n  {plan}")
    print("\n  ".join(["Run in this folder, in this order:", *recipe.commands(config.output)]))


if __name__ == "__main__":
    run(main)
