"""Tables, ratios and plots of the benchmark's measurements. All figures in them are computed."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples.benchmark.cases import (
    COMPARED,
    FOUR_STEPS,
    METHODS,
    PRFL,
    PRFL_EARLY,
    PRFL_REWARD,
    RGB_FIRST,
    RGB_REWARD,
)
from hy_prfl.runtime.atomic_writes import write_text


Row = dict[str, Any]
# Planned column and measured column.
PLANNED = {"memory": ("planned_bytes", "peak_bytes"), "FLOPs": ("planned_flops", "flops")}
COLORS = {
    PRFL: "tab:blue",
    PRFL_REWARD: "tab:cyan",
    PRFL_EARLY: "tab:green",
    "flow matching alone": "tab:gray",
    RGB_FIRST: "tab:orange",
    "RGB ReFL, all frames": "tab:red",
}


def write_report(
    folder: Path,
    rows: Sequence[Row],
    *,
    machine: Mapping[str, Any],
    timing: Mapping[str, float],
    decoding_shares: Mapping[str, float],
) -> None:
    """
    Write `results.json`, `results.md`, `time.png` and `memory.png`.

    Args:
        folder (`Path`):
            Folder to write to.
        rows (`Sequence[dict]`):
            Results of the cases that have been measured.
        machine (`Mapping`):
            Machine and versions of the measurements.
        timing (`Mapping`):
            Minimum `num_updates` and `min_seconds` of the timed updates.
        decoding_shares (`Mapping[str, float]`):
            FLOPs of decoding, divided by those of a forward of the generator, for each size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    peak = max(row["matmul_flops"] for row in rows)
    rows = [derived(row, peak) for row in rows]
    report = {
        "machine": machine,
        "matmul_flops": peak,
        "matmul_flops_median": statistics.median(row["matmul_flops"] for row in rows),
        **timing,
        "decoding_shares": decoding_shares,
        "ratios": list(ratios(rows)),
        "cases": rows,
    }
    write_text(folder / "results.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "results.md", markdown(report))
    plot(folder / "time.png", rows, "seconds_per_update", "seconds an update")
    plot(folder / "memory.png", rows, "peak_gb", "GB at most")


def derived(row: Row, peak: float) -> Row:
    """Add columns that follow from a measurement. `peak` is the best rate of a matrix product in FLOPs per second."""
    if "unavailable" in row:
        return dict(row)
    # The fastest: slower updates were disturbed by other work of the machine (see the documentation of `timeit`).
    seconds = min(row["seconds"])
    num_gradients = 0 if row["options"]["update_schedule"] == "flow_matching" else 1
    return {
        **row,
        "seconds_per_update": seconds,
        "peak_gb": row["peak_bytes"] / 1e9,
        "share_of_matmul": row["flops"] / seconds / peak,
        "reward_gradients_per_second": num_gradients * row["options"].get("num_gradient_steps", 1) / seconds,
    }


def find(rows: Iterable[Row], *, size: str, clip: str, method: str, switch: str = "") -> Row | None:
    """The row of a case; None if it was not measured or not available."""
    wanted = {"size": size, "clip": clip, "method": method, "switch": switch}
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found[0] if found and "unavailable" not in found[0] else None


def places(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Pairs of size and clip, in the order of the run."""
    return list(dict.fromkeys((row["size"], row["clip"]) for row in rows))


def ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """Ratios of which both sides were measured."""
    for size, clip in places(rows):
        at = {"size": size, "clip": clip}
        prfl, rgb = (find(rows, **at, method=method) for method in (PRFL, RGB_FIRST))
        if prfl and rgb:
            yield _ratio(at, "faster than RGB ReFL, first frame", rgb, prfl, "seconds_per_update")
            yield _ratio(at, "fewer FLOPs than RGB ReFL, first frame", rgb, prfl, "flops")
            yield _ratio(at, "less memory than RGB ReFL, first frame", rgb, prfl, "peak_gb")
        reward, rgb_reward = (find(rows, **at, method=method) for method in (PRFL_REWARD, RGB_REWARD))
        if reward and rgb_reward:
            what = "faster than RGB ReFL, first frame, both without flow matching"
            yield _ratio(at, what, rgb_reward, reward, "seconds_per_update")
        four = find(rows, **at, method=PRFL_REWARD, switch=FOUR_STEPS)
        if reward and four:
            what = "more reward gradients a second from 4 gradient steps"
            yield _ratio(at, what, four, reward, "reward_gradients_per_second")
        if prfl:
            value = prfl["overhead"]
            yield {**at, "name": "framework overhead", "value": value, "shown": f"{value:.1%}"}
    for size in dict.fromkeys(row["size"] for row in rows):
        for what, (predicted, measured) in PLANNED.items():
            found = [row[predicted] / row[measured] for row in rows if row["size"] == size and predicted in row]
            if found:
                value = max(found, key=lambda ratio: abs(ratio - 1))
                at = {"size": size, "clip": f"worst of {len(found)} cases"}
                yield {**at, "name": f"planned {what}, over measured", "value": value, "shown": f"{value:.3f}"}


def _ratio(at: Row, name: str, above: Row, below: Row, column: str) -> Row:
    value = above[column] / below[column]
    return {**at, "name": name, "value": value, "shown": f"{value:.2f} x"}


def markdown(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    machine, rows = report["machine"], report["cases"]
    devices = ", ".join(machine["devices"]["names"]) or f"{machine['cpu']}, {machine['num_threads']} threads"
    commit = machine["git"] or {"commit": "unknown", "dirty": False}
    libraries = ", ".join(
        f"{name} {machine['libraries'].get(name)}" for name in ("torch", "diffusers", "transformers", "accelerate")
    )
    unsaved = " and changes that are not committed" if commit["dirty"] else ""
    parts = [
        "# Results",
        "Written by `python -m examples.benchmark.benchmark`; [README.md](../README.md) says how to read them.",
        f"{devices}; Python {machine['python']}, {libraries}; commit {commit['commit'][:10]}{unsaved}. Fastest of "
        f"at least {report['num_updates']} updates and {report['min_seconds']:g} seconds. Largest matrix product "
        f"{report['matmul_flops'] / 1e9:.0f} GFLOP/s at best, {report['matmul_flops_median'] / 1e9:.0f} in the median "
        "of all cases: the further apart, the less quiet the machine was.",
        "## Key ratios",
        table(
            ("ratio", "size", "clip", "measured"),
            [
                (each["name"], each["size"], each["clip"], each["shown"])
                for each in sorted(report["ratios"], key=lambda each: each["name"])
            ],
        ),
    ]  # fmt: skip
    for size, clip in places(rows):
        here = [row for row in rows if (row["size"], row["clip"]) == (size, clip)]
        methods = [row for row in here if not row["switch"]]
        share = report["decoding_shares"][size]
        counted = next((row["num_parameters"] for row in here if "num_parameters" in row), 0)
        parts.append(f"## {size}, {clip}: {here[0]['num_tokens']:,} tokens")
        if clip == next(name for own, name in places(rows) if own == size):
            parts.append(
                f"Generator of {counted / 1e6:.1f} M parameters; decoding all frames takes {share:.3f} of the FLOPs of "
                "one of its forwards."
            )
        if methods:
            parts.append(method_table(methods))
        switched = [row for row in here if row["switch"]]
        if switched:
            parts.append(switch_table(switched, here))
    return "\n\n".join(parts) + "\n\n![time](time.png)\n\n![memory](memory.png)\n"


def method_table(rows: Sequence[Row]) -> str:
    """Methods on one clip, and their ratios to RGB ReFL with the first frame."""
    reference = next((row for row in rows if row["method"] == RGB_FIRST and "unavailable" not in row), None)
    head = ("method", "s", "faster", "FLOPs", "GB", "memory", "planned", "TFLOP", "of matmul", "overhead", "optimizer")
    lines = []
    for row in rows:
        if "unavailable" in row:
            lines.append((row["method"], row["unavailable"], *[""] * (len(head) - 2)))
            continue
        ratios = ["", "", ""]
        if reference is not None:
            ratios = [f"{reference[name] / row[name]:.2f} x" for name in ("seconds_per_update", "flops", "peak_gb")]
        lines.append(
            (row["method"], _digits(row["seconds_per_update"]), ratios[0], ratios[1], _digits(row["peak_gb"]), ratios[2],
             _planned(row), _digits(row["flops"] / 1e12), *_shares(row))
        )  # fmt: skip
    return table(head, lines)


def switch_table(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Switches on one clip, and their ratios to the same method without the switch."""
    head = ("switch", "of", "s", "time", "GB", "memory", "planned", "TFLOP", "of matmul", "overhead", "optimizer")
    lines = []
    for row in rows:
        if "unavailable" in row:
            lines.append((row["switch"], row["method"], row["unavailable"], *[""] * (len(head) - 3)))
            continue
        plain = find(others, size=row["size"], clip=row["clip"], method=row["method"])
        ratios = ["", ""]
        if plain is not None:
            ratios = [f"{row[name] / plain[name]:.2f} x" for name in ("seconds_per_update", "peak_gb")]
        lines.append(
            (row["switch"], row["method"], _digits(row["seconds_per_update"]), ratios[0], _digits(row["peak_gb"]),
             ratios[1], _planned(row), _digits(row["flops"] / 1e12), *_shares(row))
        )  # fmt: skip
    return table(head, lines)


def _shares(row: Row) -> tuple[str, ...]:
    return tuple(f"{row[name]:.1%}" for name in ("share_of_matmul", "overhead", "optimizer"))


def _planned(row: Row) -> str:
    return f"{row['planned_bytes'] / row['peak_bytes']:.3f} x" if "planned_bytes" in row else ""


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def plot(path: Path, rows: Sequence[Row], column: str, label: str) -> None:
    """Plot a column against the tokens of a clip: for each size one panel with more frames, one with more pixels."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = plt.subplots(len(sizes), 2, figsize=(9, 3.2 * len(sizes)), squeeze=False, layout="constrained")
    for (left, right), size in zip(axes, sizes, strict=True):
        own = [row for row in rows if row["size"] == size and not row["switch"] and "unavailable" not in row]
        base = own[0]["clip"].split("x", 1) if own else ["", ""]
        for panel, title, index in ((left, "more frames", 1), (right, "more pixels", 0)):
            for method in (name for name in METHODS if name in COMPARED):
                line = sorted(
                    (row["num_tokens"], row[column])
                    for row in own
                    if row["method"] == method and row["clip"].split("x", 1)[index] == base[index]
                )
                if line:
                    panel.plot(*zip(*line, strict=True), marker="o", color=COLORS[method], label=method)
            panel.set(title=f"{size}, {title}", xlabel="tokens", ylabel=label, ylim=(0, None))
            panel.grid(alpha=0.3)
        left.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)
