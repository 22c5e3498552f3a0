"""Committed results are of whole runs, and what the pages say of them is what is in them."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.shapes.experiments import generators, pixel_rewards, reward_models, rollouts, second_round
from examples.shapes.experiments.runs import RESULTS_DIR


SHAPES = RESULTS_DIR.parents[1]
PAGES = {SHAPES / "README.md": 20, SHAPES.parents[1] / "docs" / "status.md": 6}
# The results of a script for its usual seeds, and in `six_seeds` for more of them.
FILES = {path.stem: path for path in sorted(RESULTS_DIR.glob("*.json"))}
FILES["six_seeds"] = RESULTS_DIR / "six_seeds" / "rollouts.json"
RESULTS = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
SCRIPTS = (reward_models, generators, pixel_rewards, second_round, rollouts)
ARMS = {module.__name__.rpartition(".")[2]: module.ARMS for module in SCRIPTS} | {"six_seeds": rollouts.ARMS}


def spreads(value: Any) -> Iterator[dict[str, Any]]:
    """Every mean with its spread, however deep."""
    if isinstance(value, dict):
        if "values" in value:
            yield value
        else:
            for each in value.values():
                yield from spreads(each)
    elif isinstance(value, list):
        for each in value:
            yield from spreads(each)


@pytest.mark.parametrize("name", RESULTS)
def test_means_are_of_all_seeds(name: str) -> None:
    found = list(spreads(RESULTS[name]))
    assert found
    for each in found:
        assert len(each["values"]) == len(RESULTS[name]["seeds"])
        assert each["mean"] == pytest.approx(statistics.fmean(each["values"]), abs=2e-4)
    assert FILES[name].with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("name", [name for name in RESULTS if name in ARMS])
def test_arms_are_those_of_the_script(name: str) -> None:
    assert {*RESULTS[name]["arms"]} <= {*ARMS[name], "base"}


@pytest.mark.parametrize(("page", "fewest"), PAGES.items(), ids=lambda value: getattr(value, "name", ""))
def test_pages_quote_the_results(page: Path, fewest: int) -> None:
    """Rows of their tables that begin with an arm in code type: each `mean ± spread` is one of that arm's."""
    quoted = 0
    for line in page.read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| `(\w+)/(\w+)` \|", line)
        if row is None:
            continue
        values = list(spreads(RESULTS[row[1]]["arms"][row[2]]))
        known = {(f"{each['mean']:.2f}", f"{each['std']:.2f}") for each in values}
        for mean, std in re.findall(r"(\d\.\d\d) ± (\d\.\d\d)", line):
            assert (mean, std) in known, (line, mean, std)
            quoted += 1
    assert quoted >= fewest
