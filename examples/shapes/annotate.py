"""
Labels a generator's own videos with the judge instead of people, to train a reward model on them. Do not use these videos
for evaluation.

    python -m examples.shapes.annotate --manifest outputs/demo/samples/manifest.json --output_dir outputs/demo/labels

The last videos of the manifest go into `validation.json`, the others into `train.json`. Both are manifests for `preprocess`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.shapes.clips import MOTION_FAILURES
from examples.shapes.judge import judge_manifest, write_json
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config


@dataclass(kw_only=True)
class AnnotateConfig:
    """Options of `annotate`."""

    manifest: str = field(metadata={"help": "manifest.json of `generate`."})
    output_dir: str = field(metadata={"help": "Folder for the two manifests with labels."})
    validation_share: float = field(default=0.2, metadata={"help": "Share of the videos that is held out."})

    def __post_init__(self) -> None:
        check(0 < self.validation_share < 1, "validation_share", self.validation_share, "in (0, 1)")


def labels_of(kind: str) -> dict[str, int]:
    """Labels for a verdict: a wrong or too fast motion fails `physics_quality`, other failures fail `human_quality`."""
    is_motion = kind in (*MOTION_FAILURES, "beyond")
    return {"physics_quality": int(not is_motion), "human_quality": int(kind == "good" or is_motion)}


def annotate(manifest: Path, output_dir: Path, validation_share: float) -> dict[str, list[dict[str, Any]]]:
    """Judge the videos of a manifest and write the two labelled manifests. Returns their rows."""
    source = {row["id"]: row for row in json.loads(manifest.read_text(encoding="utf-8"))}
    verdicts, _ = judge_manifest(manifest)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for verdict in verdicts:
        video = manifest.parent / source[verdict["id"]]["video"]
        path = os.path.relpath(video, output_dir)
        rows.append({"id": verdict["id"], "video": path, "caption": verdict["caption"], **labels_of(verdict["kind"])})
    num_train = len(rows) - round(validation_share * len(rows))
    splits = {"train": rows[:num_train], "validation": rows[num_train:]}
    for name, part in splits.items():
        write_json(output_dir / f"{name}.json", part)
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(AnnotateConfig, argv, description=__doc__)
    splits = annotate(Path(config.manifest), Path(config.output_dir), config.validation_share)
    for name, rows in splits.items():
        good = sum(row["physics_quality"] * row["human_quality"] for row in rows)
        print(f"{config.output_dir}/{name}.json: {len(rows)} videos, {good} of them good")


if __name__ == "__main__":
    main()
