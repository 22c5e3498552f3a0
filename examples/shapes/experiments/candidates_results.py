"""From chains that were walked to their end to what every schedule would have chosen: numbers, a plot and a page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from examples.shapes.experiments.runs import mean_and_spread
from examples.shapes.judge import write_json
from hy_prfl.configs.keep import Decision, format_keep, num_forwards, num_scores
from hy_prfl.inference.calibration import Schedule, cheapest, cheapest_schedules, choose, rank_correlations


NUM_STEPS, NUM_FINAL = 20, 3
COUNTS = (1, 2, 4, 8, 16)
# Budgets in forwards of the generator for a video, as multiples of a plain sample's.
BUDGETS = (1.5, 2.0, 3.0, 3.6, 4.5)
SHARE = 0.95
# Blocks of the reward models, of the generator's six.
REWARD_COST = {"weak": 2 / 6, "demo": 1.0, "taught": 1.0}
# Ways to choose that the table of docs/candidates.md shows.
SHOWN_WAYS = {
    "demo": ("best of 2", "pruned, 2 x", "pruned, 3 x", "best of 4", "pruned, 4.5 x", "best of 8", "best of 16"),
    "taught": ("pruned, 3 x", "pruned, 4.5 x", "best of 8", "best of 16"),
    "weak": ("pruned, 3 x", "best of 8"),
}
# The run of the page: the demo's reward model, eight candidates.
SHOWN_MODEL, SHOWN_CAPTIONS, SHOWN_CANDIDATES = "demo", 6, 8

Chains = Mapping[str, np.ndarray]


def groups(values: np.ndarray, number: int) -> np.ndarray:
    """`(num_captions, num_candidates, ...)` -> `(num_captions * groups, number, ...)`: disjoint sets of candidates."""
    whole = values.shape[1] // number * number
    return values[:, :whole].reshape(-1, number, *values.shape[2:])


def scores(chains: Chains, model: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits after each step, final logits (mean at 400, 600, 800) and verdicts of groups of candidates."""
    final = chains[f"{model}/clean"][:, :, 1:].mean(axis=2)
    return tuple(groups(each, number) for each in (chains[f"{model}/noisy"], final, chains["kind"]))  # type: ignore[return-value]


def outcome(kinds: Sequence[np.ndarray]) -> dict[str, Any]:
    """Shares of good videos and of those beyond real ones, over seeds, one array of verdicts each."""
    shares = {kind: [float((each == kind).mean()) for each in kinds] for kind in ("good", "beyond")}
    return {kind: mean_and_spread(values) for kind, values in shares.items()} | {
        "num_videos": sum(len(each) for each in kinds)
    }


def cost(keep: tuple[Decision, ...], number: int, model: str) -> dict[str, float]:
    """Forwards of the generator for a video, and with those of the reward model, divided by a plain sample's."""
    forwards = num_forwards(keep, num_candidates=number, num_inference_steps=NUM_STEPS)
    judged = num_scores(keep, num_candidates=number, num_final_timesteps=NUM_FINAL)
    both = forwards + REWARD_COST[model] * judged
    return {"forwards": round(forwards / NUM_STEPS, 3), "with_reward": round(both / NUM_STEPS, 3)}


def run_schedule(chains: Chains, model: str, number: int, keep: tuple[Decision, ...]) -> np.ndarray:
    """Verdicts on what a schedule chooses."""
    logits, final, kinds = scores(chains, model, number)
    return kinds[np.arange(len(kinds)), choose(logits, final, keep)]


def calibrated(chains: Sequence[Chains], model: str, number: int) -> list[Schedule]:
    """Schedules that no other beats, by the reward alone."""
    parts = [scores(each, model, number) for each in chains]
    logits, final = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    return cheapest_schedules(
        logits, final, num_inference_steps=NUM_STEPS, reward_cost=0.0, num_final_timesteps=NUM_FINAL
    )


def best_within(fronts: Mapping[int, Sequence[Schedule]], budget: float) -> tuple[int, Schedule]:
    """Number of candidates and schedule with the largest gain in reward for a budget."""
    fitting = [(number, each) for number, front in fronts.items() for each in front if each.cost <= budget]
    return max(fitting, key=lambda pair: pair[1].gain)


def summarize_chains(
    chains: Sequence[Chains], changed: Mapping[str, Sequence[Mapping[str, np.ndarray]]]
) -> dict[str, Any]:
    """
    Everything about one generator, an entry of `chains` for each seed.

    Schedules are calibrated on the chains of the other seeds, by the reward alone, and judged on those of a seed.
    """
    most = chains[0]["kind"].shape[1]
    models = sorted({name.split("/")[0] for name in chains[0] if name.endswith("/noisy")})
    found: dict[str, Any] = {"plain": outcome([each["kind"].ravel() for each in chains]), "models": {}}
    has_good = {
        number: [float((groups(each["kind"], number) == "good").any(axis=1).mean()) for each in chains]
        for number in COUNTS
        if number <= most
    }
    found["oracle"] = {str(number): mean_and_spread(values) for number, values in has_good.items()}
    for model in models:
        found["models"][model] = summarize_model(chains, model, most)
    for name, runs in changed.items():
        plain = NUM_STEPS
        counts = np.concatenate([each["counts"] for each in runs]).mean(axis=0) / plain
        extra = REWARD_COST["demo"] * (counts[1] + 2 * counts[2])
        found.setdefault("changed", {})[name] = {
            **outcome([each["kind"] for each in runs]),
            "forwards": round(float(counts[0]), 3),
            "with_reward": round(float(counts[0] + extra), 3),
        }
    return found


def summarize_model(chains: Sequence[Chains], model: str, most: int) -> dict[str, Any]:
    """What one reward model chooses, and when it knows."""
    auc, ranks = [], []
    for each in chains:
        good = (each["kind"] == "good").ravel()
        logits = each[f"{model}/noisy"].reshape(len(good), -1)
        auc.append([float(roc_auc_score(good, logits[:, step])) for step in range(logits.shape[1])])
        ranks.append(rank_correlations(*scores(each, model, 8)[:2]))
    best_of = {
        str(number): {
            **outcome([run_schedule(each, model, number, ()) for each in chains]),
            **cost((), number, model),
        }
        for number in COUNTS
        if 1 < number <= most
    }
    one_step = {
        str(step): outcome([run_schedule(each, model, 8, (Decision(step, 1),)) for each in chains])
        for step in (2, 4, 6, 8, 10, 12, 16)
    }
    pruned = []
    for place, each in enumerate(chains):
        others = [other for index, other in enumerate(chains) if index != place] or [each]
        fronts = {number: calibrated(others, model, number) for number in (2, 4, 8, 16) if number <= most}
        chosen = {f"{SHARE:.0%} of best of 8": (8, cheapest(fronts[8], SHARE))}
        chosen |= {f"{budget:g} x": best_within(fronts, budget) for budget in BUDGETS}
        pruned.append(
            {
                name: (number, schedule, run_schedule(each, model, number, schedule.keep))
                for name, (number, schedule) in chosen.items()
            }
        )
    return {
        "auc": [mean_and_spread(values) for values in zip(*auc, strict=True)],
        "rank_correlation": [
            mean_and_spread([float(value) for value in values]) for values in zip(*ranks, strict=True)
        ],
        "best_of": best_of,
        "best_of_8_by_one_step": one_step,
        "pruned": {name: summarize_pruned([each[name] for each in pruned], model) for name in pruned[0]},
    }


def summarize_pruned(parts: Sequence[tuple[int, Schedule, np.ndarray]], model: str) -> dict[str, Any]:
    """One way to choose a schedule, a part for each seed: what it chose, what that costs, and what it gave."""
    costs = [cost(schedule.keep, number, model) for number, schedule, _ in parts]
    return {
        **outcome([kinds for _, _, kinds in parts]),
        "schedules": [
            f"{number} candidates, {format_keep(schedule.keep) or 'none dropped'}" for number, schedule, _ in parts
        ],
        **{name: round(float(np.mean([each[name] for each in costs])), 3) for name in ("forwards", "with_reward")},
    }


def write_results(
    results_dir: Path, results: Mapping[str, Any], seeds: Sequence[int], shown: Chains, captions: Sequence[str]
) -> None:
    """`candidates.json`, `candidates.png` and `candidates.html`."""
    write_json(results_dir / "candidates.json", {"seeds": list(seeds), "generators": results})
    plot(results, results_dir / "candidates.png")
    schedule = results["base"]["models"][SHOWN_MODEL]["pruned"][f"{SHARE:.0%} of best of 8"]["schedules"][0]
    page = write_page(shown, captions, schedule)
    (results_dir / "candidates.html").write_text(page, encoding="utf-8")


def table(results: Mapping[str, Any]) -> list[str]:
    """Rows of the table in docs/candidates.md: ways to sample, by generator and reward model."""
    rows = []
    for generator, found in results.items():
        rows.append(row(generator, "", "one sample", found["plain"], 1.0, 1.0))
        for model, shown in SHOWN_WAYS.items():
            each = found["models"][model]
            ways = {f"best of {number}": point for number, point in each["best_of"].items()}
            ways |= {f"pruned, {name}": point for name, point in each["pruned"].items()}
            for name in (name for name in shown if name in ways):
                point = ways[name]
                rows.append(row(generator, model, name, point, point["forwards"], point["with_reward"]))
        for name, point in found.get("changed", {}).items():
            rows.append(row(generator, "demo", name, point, point["forwards"], point["with_reward"]))
    return rows


def row(generator: str, model: str, way: str, point: Mapping[str, Any], forwards: float, with_reward: float) -> str:
    """Shares in percent, mean and spread over the seeds; costs as multiples of a plain sample's."""
    good, beyond = (f"{100 * point[kind]['mean']:.0f} ± {100 * point[kind]['std']:.0f}" for kind in ("good", "beyond"))
    return f"| {generator} | {model} | {way} | {good} | {beyond} | {forwards:.1f} | {with_reward:.1f} |"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Good share against forwards; against the number of candidates; and what each step knows."""
    figure = Figure(figsize=(4.3 * (len(results) + 2), 3.8), layout="constrained")
    panels = figure.subplots(1, len(results) + 2)
    for axes, (generator, found) in zip(panels, results.items(), strict=False):
        plot_cost(axes, found)
        axes.set(title=f"{generator} generator", xlabel="forwards for a video / plain sample", ylim=(0.2, 1.02))
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    panels[0].set_ylabel("good videos, by the judge")
    base, axes = results["base"], panels[-2]
    for model, found in base["models"].items():
        numbers = [1, *map(int, found["best_of"])]
        for kind, style in (("good", "-"), ("beyond", ":")):
            means = [base["plain"][kind]["mean"], *(each[kind]["mean"] for each in found["best_of"].values())]
            label = f"{model}: {kind}"
            axes.plot(numbers, means, style, marker="o", markersize=3, label=label)
    oracle = base["oracle"]
    axes.plot(
        [int(number) for number in oracle], [each["mean"] for each in oracle.values()], "k--", lw=1, label="oracle"
    )
    axes.set(title="what mistakes cost (base)", xlabel="N, best of N", xscale="log", ylim=(0, 1.02))
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.legend(fontsize=7, frameon=False)
    for model, found in base["models"].items():
        points = found["auc"]
        panels[-1].errorbar(
            range(1, len(points) + 1), [point["mean"] for point in points], yerr=[point["std"] for point in points],
            marker="o", markersize=3, capsize=2, label=model,
        )  # fmt: skip
    panels[-1].axhline(0.5, color="gray", linestyle=":")
    panels[-1].set(
        title="what the reward knows (base)", xlabel=f"after step, of {NUM_STEPS}", ylabel="AUC of good videos"
    )
    panels[-1].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None}, dpi=110)


def plot_cost(axes: Axes, found: Mapping[str, Any]) -> None:
    for model, each in found["models"].items():
        best_of = each["best_of"].values()
        costs = [1.0, *(point["forwards"] for point in best_of)]
        means = [found["plain"]["good"]["mean"], *(point["good"]["mean"] for point in best_of)]
        (line,) = axes.plot(costs, means, marker="o", markersize=3, label=f"{model}: best of N")
        pruned = [point for name, point in each["pruned"].items() if name.endswith("x")]
        axes.errorbar(
            [point["forwards"] for point in pruned], [point["good"]["mean"] for point in pruned],
            yerr=[point["good"]["std"] for point in pruned],
            color=line.get_color(), linestyle="--", marker="s", markersize=4, capsize=2, label=f"{model}: pruned",
        )  # fmt: skip
    for marker, (name, point) in zip("^vD<>", found.get("changed", {}).items(), strict=False):
        axes.plot(point["forwards"], point["good"]["mean"], marker, color="black", markersize=5, label=f"demo: {name}")


def write_page(chains: Chains, captions: Sequence[str], schedule: str) -> str:
    """Candidates side by side: frames of what each would have become, where it was dropped, and the verdict."""
    keep = tuple(Decision(*map(int, part.split(":"))) for part in schedule.split(", ")[1].split(",") if ":" in part)
    sections = []
    for number, caption in enumerate(captions[:SHOWN_CAPTIONS]):
        logits = chains[f"{SHOWN_MODEL}/noisy"][number, :SHOWN_CANDIDATES]
        final = chains[f"{SHOWN_MODEL}/clean"][number, :SHOWN_CANDIDATES, 1:].mean(axis=1)
        dropped = where_dropped(logits, final, keep)
        cards = "".join(
            card(
                chains["frames"][number, candidate],
                candidate,
                dropped[candidate],
                str(chains["kind"][number, candidate]),
            )
            for candidate in range(SHOWN_CANDIDATES)
        )
        sections.append(f"<h2>{html.escape(caption)}</h2><div class=row>{cards}</div>")
    return PAGE.format(schedule=html.escape(schedule), body="\n".join(sections))


def where_dropped(logits: np.ndarray, final: np.ndarray, keep: tuple[Decision, ...]) -> list[int | None]:
    """Step after which each candidate is dropped, None for the winner."""
    dropped: list[int | None] = [None] * len(final)
    alive = list(range(len(final)))
    decisions = [(each.step, each.num_kept, logits[:, each.step - 1]) for each in keep] + [(NUM_STEPS, 1, final)]
    for step, num_kept, values in decisions:
        ranked = sorted(alive, key=lambda each: -values[each])
        for loser in ranked[num_kept:]:
            dropped[loser] = step
        alive = ranked[:num_kept]
    return dropped


def card(frames: np.ndarray, number: int, dropped: int | None, kind: str) -> str:
    """One candidate."""
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    buffer = io.BytesIO()
    strip.save(buffer, format="webp", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    fate = "chosen" if dropped is None else f"dropped after step {dropped}"
    style = "chosen" if dropped is None else ""
    source = f"data:image/webp;base64,{data}"
    return f'<figure class="{style}"><img src="{source}" alt=""><figcaption>{number}: {fate}; {kind}</figcaption></figure>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Candidates side by side</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: 8px; }}
figure {{ margin: 0; padding: 4px; border: 2px solid #ccc; opacity: .75; }}
figure.chosen {{ border-color: #2a7; opacity: 1; }}
img {{ display: block; width: 240px; image-rendering: pixelated; }}
h2 {{ font-size: 1rem; }}
</style>
<h1>Candidates side by side</h1>
<p>Pretrained generator, the demo's reward model, {schedule}. Each strip is every fourth frame of what the candidate
becomes if it is not dropped; the word after that is the judge's verdict.</p>
{body}
</html>
"""
