"""
What all experiments start from: `python -m examples.shapes.experiments.inputs`, about 20 minutes on two cores.

Latents of real clips: with labels and all failures, of the pretraining's mixture, and good ones only; videos of the
pretrained generator's own with the judge's verdicts for labels; and prompts that nobody trains on, with a seed of their
own for each seed of an experiment.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.shapes.demo import write_prompts
from examples.shapes.experiments.runs import ExperimentConfig
from examples.shapes.judge import write_json
from examples.shapes.pretrain import clips_options
from examples.shapes.stages import Stage, launch, python
from examples.shapes.summary import read_json
from examples.stages import run_stages
from hy_prfl.configs.parser import parse_config


NUM_SAMPLES, NUM_LABELLED, NUM_PROMPTS = 3072, 2048, 72
# Options of `examples.shapes.clips`; the mixture is that of the pretraining's last phase.
CLIPS = {
    "mixture": ["--num_clips", "1024", *clips_options(), "--seed", "11"],
    "labelled": ["--num_clips", str(NUM_LABELLED), "--good_share", "0.5", "--seed", "21"],
    "good": ["--num_clips", "512", "--good_share", "1", "--seed", "12"],
    "held_out": ["--num_clips", "24", "--split", "held_out", "--seed", "13"],
}


def video_stages(root: Path) -> list[Stage]:
    """The commands that make videos and their labels."""
    samples = ["--prompts", str(root / "sample_prompts.json"), "--output_dir", str(root / "samples")]
    labels = ["--manifest", str(root / "samples" / "manifest.json"), "--output_dir", str(root / "labels")]
    return [
        Stage(
            "samples",
            "the generator's own videos",
            [launch("generate", samples, two_processes=True)],
            ["samples"],
        ),
        Stage("labels", "the judge's labels", [python("annotate", labels)], ["labels"]),
        Stage(
            "clips",
            "real clips",
            [
                python("clips", ["--output_dir", str(root / "clips" / name), *options])
                for name, options in CLIPS.items()
            ],
            ["clips"],
        ),
    ]


def latent_stages(root: Path) -> list[Stage]:
    """The commands that encode them."""
    manifests = {name: root / "clips" / name / "manifest.json" for name in CLIPS}
    manifests |= {f"samples_{part}": root / "labels" / f"{part}.json" for part in ("train", "validation")}
    both = {"own_and_real": root / "own_and_real.json"}
    return [
        Stage("latents", "latents of all of them", preprocess_commands(root, manifests), ["latents"]),
        Stage(
            "both",
            "own videos and real clips in one dataset",
            preprocess_commands(root, both),
            ["latents/own_and_real"],
        ),
    ]


def preprocess_commands(root: Path, manifests: Mapping[str, Path], *, two_processes: bool = True) -> list[list[str]]:
    """One command for each dataset below `root/latents`."""
    return [
        launch(
            "preprocess",
            ["--manifest", str(manifest), "--output_dir", str(root / "latents" / name)],
            two_processes=two_processes,
        )
        for name, manifest in manifests.items()
    ]


def make_inputs(root: Path, seeds: Sequence[int]) -> None:
    """Make what is not there yet."""
    write_prompts(root / "sample_prompts.json", "train", NUM_SAMPLES, first_seed=100_000)
    for seed in seeds:
        write_prompts(root / f"prompts_{seed}.json", "held_out", NUM_PROMPTS, first_seed=1000 * (seed + 1))
    run_stages(video_stages(root), root, fresh=False)
    merge_manifests(labelled_manifests(root), root / "own_and_real.json")
    run_stages(latent_stages(root), root, fresh=False)


def labelled_manifests(root: Path) -> list[Path]:
    """The generator's own videos and real clips, both with labels."""
    return [root / "labels" / "train.json", root / "clips" / "labelled" / "manifest.json"]


def merge_manifests(manifests: Sequence[Path], path: Path) -> None:
    """Write the rows of several manifests as one; videos are named as seen from its folder."""
    rows = [
        {**row, "video": os.path.relpath(manifest.parent / row["video"], path.parent)}
        for manifest in manifests
        for row in read_json(manifest)
    ]
    write_json(path, rows)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    make_inputs(Path(config.output_dir), config.seeds)


if __name__ == "__main__":
    main()
