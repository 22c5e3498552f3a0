"""
Process with a pretended GPU: `python -m examples.real_size.pretending LIBRARY RECIPE...`

Runs a step of each recipe in its own process, forked from this one, which has imported everything. So an error, such
as a tensor that is not fake, ends one recipe only. Prints one line with a JSON object per recipe.
"""

import dataclasses
import json
import os
import resource
import sys
import traceback
from pathlib import Path

from examples.real_size.library import load_library


# Bytes that a recipe's process may allocate. A tensor of real size that is not fake exceeds them.
ADDRESS_SPACE = 12 << 30


def measure_recipe(path: Path) -> dict[str, object]:
    """Run a step of a recipe. Only in a process with the pretended device."""
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
    """Run one recipe in its own process, and print the result or the error."""
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
            # `_exit`, because the exit handlers of the parent process must not run in the fork.
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status:
            print(json.dumps({"error": f"its process ended with status {status}"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
