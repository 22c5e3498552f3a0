"""
The console command `hy-prfl`: the scripts of this package by name.

    hy-prfl <command> --config FILE.yaml [--option value ...]
    hy-prfl <command> --help

To run a command on several processes, start its module with Accelerate:

    accelerate launch -m hy_prfl.scripts.<command> --config FILE.yaml

A mistake in options or input is reported in one line, `error: ...`, with exit code 2. Set HY_PRFL_TRACEBACK=1 in the
environment to see the traceback instead.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from .scripts.running import run


COMMANDS = {
    "preprocess": "videos and captions -> a dataset of latents and prompt embeddings",
    "annotate": "a web page on which people label clips or compare pairs of clips",
    "compare": "a web page on which people compare the videos of two generators",
    "label": "join annotations to a latent dataset",
    "train_reward": "train a reward model on noisy latents (PAVRM)",
    "train_prfl": "fine-tune a generator with a reward model (PRFL)",
    "plan": "memory, FLOPs and time that a recipe needs",
    "score": "score videos or latents",
    "generate": "prompts -> videos",
    "convert": "read checkpoints in Wan's or upstream's own format",
    "convert_recipe": "a YAML file of upstream -> a recipe, and the command to run it",
    "report": "a run -> one HTML page about it",
    "push": "a run, a model or a dataset -> the Hugging Face Hub",
    "pull": "a repository of the Hub -> a folder",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command as a program, see [`~hy_prfl.scripts.running.run`]."""
    run(partial(_run_command, list(sys.argv[1:] if argv is None else argv)))


def _run_command(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"    {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
        sys.stdout.write(f"{(__doc__ or '').strip()}\n\ncommands:\n{commands}\n")
        return
    if command not in COMMANDS:
        raise ValueError(f"there is no command '{command}'; it is one of {', '.join(COMMANDS)}.")
    importlib.import_module(f"hy_prfl.scripts.{command}").main(argv[1:])


if __name__ == "__main__":
    main()
