"""Summarises the demo from the files that its stages wrote: a JSON file, a table and a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from examples.shapes.clips import FPS, NUM_FRAMES
from examples.shapes.judge import judge_videos, write_json
from examples.shapes.report import ARMS, Comparison, read_metrics, rewards_by_third, write_report
from hy_prfl.data.video import read_video


RUNS = ("reward", "flow_matching", "prfl", "round_reward", "round")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def summarize(root: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Share of good videos, failures and rewards of each arm, and metrics of the reward model."""
    summary: dict[str, Any] = {}
    for arm in ARMS:
        verdicts = read_json(root / "verdicts" / f"{arm}.json")["summary"]
        rewards = read_json(root / "scores" / f"{arm}.csv.summary.json")["rewards"]
        summary[arm] = {
            **verdicts,
            "reward": rewards["reward"],
            "rewards_by_timestep": {
                name.removeprefix("reward_t"): value for name, value in rewards.items() if name.startswith("reward_t")
            },
        }
    labels = [
        row["physics_quality"] * row["human_quality"]
        for row in read_json(root / "clips" / "held_out" / "manifest.json")
    ]
    summary["reward_model"] = {
        "metrics": read_json(root / "reward" / "best" / "metrics.json"),
        "majority_accuracy": max(sum(labels), len(labels) - sum(labels)) / len(labels),
        "num_labels": len(labels),
    }
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    return summary


def curves(root: Path, run: str) -> Path:
    """Write the metrics of a run, with the judge's results for its validation videos. Returns the file."""
    lines = read_metrics(root / run / "metrics.jsonl")
    judged = judge_validations(root / run, root / "clips" / "held_out" / "manifest.json")
    lines += [{"step": step, "judge/good": good} for step, good in judged.items()]
    path = root / "curves" / f"{run}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines.sort(key=lambda line: line["step"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def judge_validations(run_dir: Path, manifest: Path) -> dict[int, float]:
    """
    The judge's share of good videos among the samples of each validation of a run of `train_prfl`, by its step.

    Args:
        run_dir (`Path`):
            Output folder of the run, with videos of its validations.
        manifest (`Path`):
            Manifest of its validation dataset, with the captions of the videos.
    """
    captions = [row["caption"] for row in read_json(manifest)]
    shares = {}
    for folder in (run_dir / "validation").glob("step-*"):
        paths = sorted(folder.glob("*.mp4"))
        videos = (read_video(path, fps=FPS, num_frames=NUM_FRAMES) for path in paths)
        verdicts = judge_videos(videos, [captions[int(path.stem)] for path in paths])
        shares[int(folder.name.removeprefix("step-"))] = sum(verdict.good for verdict in verdicts) / len(verdicts)
    return dict(sorted(shares.items()))


def write_page(root: Path, summary: Mapping[str, Any], num_videos: int = 12) -> Path:
    """Write `report.html`, a page with all results."""
    verdicts = {
        arm: {row["id"]: row["kind"] for row in read_json(root / "verdicts" / f"{arm}.json")["verdicts"]}
        for arm in ARMS
    }
    videos = {
        arm: {
            row["id"]: root / "videos" / arm / row["video"]
            for row in read_json(root / "videos" / arm / "manifest.json")
        }
        for arm in ARMS
    }
    rows = read_json(root / "videos" / "base" / "manifest.json")[:num_videos]
    comparisons = [
        Comparison(
            caption=row["caption"],
            seed=row["seed"],
            videos={arm: videos[arm][row["id"]] for arm in ARMS},
            verdicts={arm: verdicts[arm][row["id"]] for arm in ARMS},
        )
        for row in rows
    ]
    configs = {run: yaml.safe_load((root / run / "config.yaml").read_text(encoding="utf-8")) for run in RUNS}
    return write_report(
        root / "report.html",
        summary=summary,
        runs={run: curves(root, run) for run in RUNS},
        videos=comparisons,
        config=configs,
    )


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the tables at the end of the demo."""
    print(f"\n{'stage':<14}{'seconds':>8}")
    for name, value in summary["seconds"].items():
        print(f"{name:<14}{value:>8.0f}")

    metrics = summary["reward_model"]["metrics"]
    timesteps = [name.split("/t")[1] for name in metrics if name.startswith("accuracy/t")]
    print(f"\n{'reward model, held-out samples':<32}" + "".join(f"{f't {timestep}':>8}" for timestep in timesteps))
    for kind in ("accuracy", "auc"):
        print(f"{kind:<32}" + "".join(f"{metrics[f'{kind}/t{timestep}']:>8.2f}" for timestep in timesteps))
    print(f"always guessing the majority label has accuracy {summary['reward_model']['majority_accuracy']:.2f}")

    failures = list(summary["base"]["failures"])
    print(f"\n{'held-out captions':<20}{'good':>6}{'reward':>8}{'early':>7}{'middle':>8}{'late':>6}", end="")
    print("".join(f"{name.replace('_', ' '):>17}" for name in failures))
    for arm, title in ARMS.items():
        row = summary[arm]
        thirds = rewards_by_third(row["rewards_by_timestep"])
        print(f"{title:<20}{row['good']:>6.0%}{row['reward']:>8.2f}", end="")
        print(f"{thirds['early']:>7.2f}{thirds['middle']:>8.2f}{thirds['late']:>6.2f}", end="")
        print("".join(f"{row['failures'][name]:>17}" for name in failures))
    print("`good` is the verdict of the judge, which sees only pixels. `reward` is the score of the reward model.")


def finish(root: Path, seconds: Mapping[str, float]) -> None:
    """Write `summary.json` and `report.html`, and print the table."""
    summary = summarize(root, seconds)
    write_json(root / "summary.json", summary)
    page = write_page(root, summary)
    print_summary(summary)
    print(f"\nsummary  {root / 'summary.json'}\npage     {page}")
