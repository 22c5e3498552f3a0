"""
The process that pretends to have a GPU: `python -m examples.real_size.pretending LIBRARY RECIPE...`

Runs a step of each recipe in a process of its own, forked from this one, which has imported all that it takes; so a
tensor that is not fake ends one recipe only. Each prints a JSON object in a line of its own.
"""

import dataclasses
import json
import os
import resource
import sys
import traceback
from pathlib import Path

from examples.real_size.library import load_library


# Bytes that a recipe's process may map. A tensor of real size that is not fake takes more.
ADDRESS_SPACE = 12 << 30


def measure_recipe(path: Path) -> dict[str, object]:
    """Run a step of a recipe, in a process that pretends."""
    from examples.real_size.recipes import load_recipe
    from examples.real_size.steps import Setting, measure
    from hy_prfl.formats.pipeline_info import PipelineInfo
    from hy_prfl.models.experts import choose_experts

    recipe = load_recipe(path)
    training = recipe.training
    info = PipelineInfo.known(training.pretrained_model_name_or_path)
    transformer_config, (frames, rows, columns) = info.transformer, info.vae_stride
    setting = Setting(
        training=training,
        transformer_config=transformer_config,
        experts=choose_experts(info, training.expert),
        latents_shape=(
            transformer_config["out_channels"],
            (recipe.num_frames - 1) // frames + 1,
            recipe.height // rows,
            recipe.width // columns,
        ),
        zero_stage=recipe.zero_stage,
        num_gpus=recipe.num_gpus,
    )
    return dataclasses.asdict(measure(setting))


def _run(path: Path) -> None:
    """The life of a recipe's process."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    try:
        result = measure_recipe(path)
    except Exception:
        result = {"error": traceback.format_exc().strip()}
    print(json.dumps(result), flush=True)


def main(library: str, *paths: str) -> None:
    """Run all recipes, one after the other."""
    load_library(Path(library))
    from examples.real_size.pretended_cuda import start

    start()
    import examples.real_size.recipes
    import examples.real_size.steps  # noqa: F401

    for path in paths:
        process = os.fork()
        if process == 0:
            _run(Path(path))
            # Not the way back through the parent's frames and exit handlers.
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status:
            print(json.dumps({"error": f"its process ended with status {status}"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
