"""Runs the arms of an experiment, several at a time, each once, and puts their numbers together."""

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from tqdm import tqdm

from examples.shapes.stages import Stage
from examples.shapes.summary import read_json
from hy_prfl.configs.base import check


RESULTS_DIR = Path(__file__).parent / "results"


@dataclass(kw_only=True)
class ExperimentConfig:
    """What to run."""

    output_dir: str = field(default="outputs/experiments", metadata={"help": "Folder for models, videos and logs."})
    results_dir: str = field(default=str(RESULTS_DIR), metadata={"help": "Folder for the JSON file and the plot."})
    arms: list[str] = field(default_factory=list, metadata={"help": "Arms to run; all if left out."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds to run each arm with."})
    num_parallel: int = field(default=2, metadata={"help": "Runs at a time, each with one thread."})

    def __post_init__(self) -> None:
        check(len(self.seeds) > 0 and min(self.seeds) >= 0, "seeds", self.seeds, "one or more, none negative")
        check(self.num_parallel >= 1, "num_parallel", self.num_parallel, "at least 1")

    def choose(self, known: Sequence[str]) -> list[str]:
        """The arms to run, in the order they are known."""
        unknown = sorted({*self.arms} - {*known})
        check(not unknown, "arms", unknown, f"of {', '.join(known)}")
        return [arm for arm in known if not self.arms or arm in self.arms]


def run_all(stages: Sequence[Stage], root: Path, num_parallel: int) -> None:
    """
    Run the stages that are not complete, `num_parallel` at a time; their output is in `root/logs`.

    Raises:
        StageError: If a command fails, once those that run beside it are done; no other stage is started then.
    """
    (root / "logs").mkdir(parents=True, exist_ok=True)
    left = [stage for stage in stages if not stage.is_complete(root)]
    progress = tqdm(total=len(stages), initial=len(stages) - len(left), unit="run")

    def run(stage: Stage) -> None:
        stage.run(root, log=root / "logs" / f"{stage.name}.txt")
        progress.update()

    with progress, ThreadPoolExecutor(num_parallel) as pool:
        futures = [pool.submit(run, stage) for stage in left]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def mean_and_spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean and sample standard deviation over seeds, and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "mean": round(statistics.fmean(values), 4),
        "std": round(spread, 4),
        "values": [round(value, 4) for value in values],
    }


def with_other_arms(path: Path, results: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """
    The arms of `results`, with those that were not run now as they are in the results at `path`.

    Args:
        results (`Mapping[str, Any]`):
            Has the arms that were run and `base`, and the seeds and the number of videos.
        known (`Sequence[str]`):
            All arms, in the order of the results.

    Raises:
        ValueError: If there are other arms, but for other seeds, another number of videos or another base.
    """
    if not path.is_file():
        return dict(results["arms"])
    before = read_json(path)
    arms = {name: arm for name, arm in before["arms"].items() if name in known} | results["arms"]
    if {*arms} > {*results["arms"]}:
        for name in ("seeds", "num_videos"):
            check(results[name] == before[name], name, results[name], f"{before[name]}, as in '{path}'")
        same = before["arms"]["base"] == results["arms"]["base"]
        check(same, "results_dir", str(path.parent), "another folder: the base has other verdicts in its results")
    return {name: arms[name] for name in ("base", *known) if name in arms}


def plot_spread(axes: Axes, x: Sequence[float], points: Sequence[Mapping[str, Any]], label: str) -> None:
    """A line through means, with bars of their spread."""
    axes.errorbar(
        x,
        [point["mean"] for point in points],
        yerr=[point["std"] for point in points],
        marker="o", markersize=3, capsize=2, label=label,
    )  # fmt: skip
