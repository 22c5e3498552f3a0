"""What a command prints while it runs."""

import logging
import os


def set_up_logging() -> None:
    """Show messages and progress bars of the main process only. Reads `RANK` and sets up no processes itself."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    is_main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("hy_prfl").setLevel(logging.INFO if is_main else logging.ERROR)
    if not is_main:
        # Here, because some commands do without these libraries.
        import datasets
        import diffusers
        import transformers

        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        datasets.disable_progress_bars()
