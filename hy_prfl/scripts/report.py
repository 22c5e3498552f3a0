r"""
Writes one HTML file that shows a run: curves, noise levels, samples, cost, configuration, provenance.

    hy-prfl report outputs/prfl
    hy-prfl report outputs/prfl --plan plan.json --before outputs/base --after outputs/tuned

Plots and videos are inside the file. A run writes this report when it ends.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..configs.inputs import check_files, check_paths
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.report import ReportConfig
from .running import run


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of one run."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_named = any(word == "--run" or word.startswith("--run=") for word in words)
    if words and not words[0].startswith("-") and not is_named:
        words.insert(0, "--run")
    config = parse_config(ReportConfig, words, description=__doc__)
    check_paths(config, "run", "before", "after")
    check_files(config, "plan", "scores")
    check_output_files(config, "output")
    comparisons = list(config.comparisons or [])
    for path in comparisons:
        if not Path(path).is_file():
            raise FileNotFoundError(f"`comparisons`: there is no file '{path}'.")
    own = Path(config.run) / "comparison.json"
    if own.is_file() and not any(Path(path).samefile(own) for path in comparisons):
        comparisons.append(str(own))

    # Imported here, so that a misspelt option is reported before libraries are loaded.
    from ..pages.report import write_run_page
    from ..runtime.messages import set_up_logging

    set_up_logging()
    page = write_run_page(
        config.run,
        config.output,
        title=config.title,
        plan=config.plan,
        scores=config.scores,
        before=config.before,
        after=config.after,
        comparisons=comparisons,
        num_samples=config.num_samples,
        max_megabytes=config.max_megabytes,
    )
    print(f"{page.stat().st_size / 1e6:.1f} MB: {page}")


if __name__ == "__main__":
    run(main)
