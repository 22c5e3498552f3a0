"""
Labels a generator's own videos with the judge instead of people, to train a reward model on them. Do not use these videos
for evaluation.

    python -m examples.shapes.annotate --manifest outputs/demo/samples/manifest.json --output_dir outputs/demo/labels

The last videos of the manifest go into `validation.json`, the others into `train.json`. Both are manifests for `preprocess`.
With `--output` all of them go into one file, with the judge's verdict on each, which is what `examples.rounds` needs.
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
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the two manifests with labels."})
    output: str | None = field(default=None, metadata={"help": "JSON file for all labels, instead of a folder."})
    validation_share: float = field(default=0.2, metadata={"help": "Share of the videos that is held out."})

    def __post_init__(self) -> None:
        one = (self.output_dir is None) != (self.output is None)
        check(one, "output_dir", self.output_dir, "given, or else `output`")
        check(0 < self.validation_share < 1, "validation_share", self.validation_share, "in (0, 1)")


def labels_of(kind: str) -> dict[str, int]:
    """Labels for a verdict: a wrong or too fast motion fails `physics_quality`, other failures fail `human_quality`."""
    is_motion = kind in (*MOTION_FAILURES, "beyond")
    return {"physics_quality": int(not is_motion), "human_quality": int(kind == "good" or is_motion)}


def labelled_rows(manifest: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of a manifest with the judge's labels and its word for each video; paths are relative to a folder."""
    source = {row["id"]: row for row in json.loads(manifest.read_text(encoding="utf-8"))}
    rows = []
    for verdict in judge_manifest(manifest)[0]:
        path = os.path.relpath(manifest.parent / source[verdict["id"]]["video"], folder)
        row = {"id": verdict["id"], "video": path, "caption": verdict["caption"]}
        rows.append({**row, **labels_of(verdict["kind"]), "kind": verdict["kind"]})
    return rows


def annotate(manifest: Path, output_dir: Path, validation_share: float) -> dict[str, list[dict[str, Any]]]:
    """Judge the videos of a manifest and write the two labelled manifests. Returns their rows."""
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = [{name: row[name] for name in row if name != "kind"} for row in labelled_rows(manifest, output_dir)]
    num_train = len(rows) - round(validation_share * len(rows))
    splits = {"train": rows[:num_train], "validation": rows[num_train:]}
    for name, part in splits.items():
        write_json(output_dir / f"{name}.json", part)
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(AnnotateConfig, argv, description=__doc__)
    manifest = Path(config.manifest)
    if config.output is not None:
        rows = labelled_rows(manifest, Path(config.output).parent)
        write_json(Path(config.output), rows)
        written = {config.output: rows}
    else:
        folder = Path(str(config.output_dir))
        splits = annotate(manifest, folder, config.validation_share)
        written = {str(folder / f"{name}.json"): rows for name, rows in splits.items()}
    for path, rows in written.items():
        good = sum(row["physics_quality"] * row["human_quality"] for row in rows)
        print(f"{path}: {len(rows)} videos, {good} of them good")


if __name__ == "__main__":
    main()
