"""Runs a command. A mistake of the user ends it with one line, a bug with a traceback."""

import linecache
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ..configs.parser import TRACEBACK_VARIABLE


EXIT_CODE = 2
# Seconds that other processes of a launch wait before they print their error, so that the first process can print it
# once for all of them.
PATIENCE = 20.0
PACKAGE = Path(__file__).parents[1]


def run(main: Callable[[], None]) -> None:
    """
    Run a command as a program, and turn mistakes that `main` raises into messages for the user.

    A mistake (see [`is_mistake`]) is printed on one line of stderr as `error: ...`, and the process exits with code 2. If
    the environment variable HY_PRFL_TRACEBACK is set, the traceback is printed instead. Other exceptions are raised.

    Processes of one launch usually fail together. Process 0 prints the error, and the launcher then ends the others. If
    that does not happen within `PATIENCE` seconds, the others print their own errors, the first process of each machine
    before the rest.
    """
    try:
        main()
    except Exception as error:
        if not is_mistake(error):
            raise
        _wait_for_the_first_process()
        if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        else:
            message = " ".join(line.strip() for line in str(error).splitlines())
            # Offline, diffusers says that the model does not have the file.
            if "does not appear to have a file named" in message and os.environ.get("HF_HUB_OFFLINE", "0") != "0":
                message += " The Hub was not contacted: HF_HUB_OFFLINE is set."
            sys.stderr.write(f"error: {message or type(error).__name__}\n")
        sys.exit(EXIT_CODE)
    if "hy_prfl.runtime.distributed" in sys.modules:  # otherwise no process group exists
        from ..runtime.distributed import leave_processes

        leave_processes()


def _wait_for_the_first_process() -> None:
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    on_first_machine = rank == local_rank
    time.sleep(PATIENCE * ((rank != "0") + (local_rank != "0" and not on_first_machine)))


def is_mistake(error: Exception) -> bool:
    """
    Whether an error is about options, input or environment, and not a bug of this package or of a library.

    These errors count as mistakes:

    - an error from a `raise` statement in this package, because its message is written for users;
    - an `OSError`, because it is about files or connections;
    - a `ValueError` from a `from_pretrained`, because it is about the files that are loaded.

    Any other `ValueError`, for example from torch, is a bug and needs its traceback.
    """
    if isinstance(error, OSError):
        # An error in a worker process of a data loader has that process's traceback as its message.
        return "Traceback (most recent call last)" not in str(error)
    places = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, ValueError) and any(frame.f_code.co_name == "from_pretrained" for frame, _ in places):
        return True
    frame, line_number = places[-1]
    is_ours = Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    return is_ours and linecache.getline(frame.f_code.co_filename, line_number).strip().startswith("raise ")
