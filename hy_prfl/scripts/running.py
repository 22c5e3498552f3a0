"""How a command ends: in one line if the user can mend it, in a traceback if it is a bug."""

import linecache
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ..configs.parser import TRACEBACK_VARIABLE


EXIT_CODE = 2
# Seconds that other processes of a launch leave to the first one to say what is wrong with all of them.
PATIENCE = 20.0
PACKAGE = Path(__file__).parents[1]


def run(main: Callable[[], None]) -> None:
    """
    Run a command as a program. What `main` raises in Python ends here as a user sees it.

    A mistake (see [`is_mistake`]) is printed as `error: ...` on one line of stderr, with its traceback in place of that if
    the environment variable HY_PRFL_TRACEBACK is set, and the process exits with code 2. Anything else is raised.

    Processes that were launched together mostly fail together. Process 0 speaks for all; the launcher ends the others when
    it is gone. If it is not, the others speak for themselves after a while, the first of a machine before the rest.
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
            # diffusers says of a model that it could not ask for that it has no such file.
            if "does not appear to have a file named" in message and os.environ.get("HF_HUB_OFFLINE", "0") != "0":
                message += " The Hub was not asked for it: HF_HUB_OFFLINE is set."
            sys.stderr.write(f"error: {message or type(error).__name__}\n")
        sys.exit(EXIT_CODE)
    if "hy_prfl.runtime.distributed" in sys.modules:  # or nothing has joined processes
        from ..runtime.distributed import leave_processes

        leave_processes()


def _wait_for_the_first_process() -> None:
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    on_first_machine = rank == local_rank
    time.sleep(PATIENCE * ((rank != "0") + (local_rank != "0" and not on_first_machine)))


def is_mistake(error: Exception) -> bool:
    """
    Whether an error is about options, input or environment and not a bug of this package or of a library.

    That is: what this package raises by a `raise` statement of its own, with a message that is written for people; what
    the system and libraries say about files and connections (`OSError`); and a `ValueError` out of a `from_pretrained`,
    which is about the files that it loads. A `ValueError` out of another operation that failed, or from within torch, is a
    bug and needs its traceback.
    """
    if isinstance(error, OSError):
        # The message of an error in a process that reads data is that process's traceback.
        return "Traceback (most recent call last)" not in str(error)
    places = list(traceback.walk_tb(error.__traceback__))
    if isinstance(error, ValueError) and any(frame.f_code.co_name == "from_pretrained" for frame, _ in places):
        return True
    frame, line_number = places[-1]
    is_ours = Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
    return is_ours and linecache.getline(frame.f_code.co_filename, line_number).strip().startswith("raise ")
