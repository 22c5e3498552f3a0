"""
What all experiments start from: `python -m examples.shapes.experiments.inputs`, about 20 minutes on two cores.

Latents of real clips: with labels and all failures, of the pretraining's mixture, and good ones only; videos of the
pretrained generator's own with the judge's verdicts for labels; and prompts that nobody trains on, with a seed of their
own for each seed of an experiment.
"""

from collections.abc import Sequence
from pathlib import Path

from examples.shapes.demo import write_prompts
from examples.shapes.experiments.runs import ExperimentConfig
from examples.shapes.pretrain import clips_options
from examples.shapes.stages import Stage, launch, python, run_stages
from hy_prfl.configs.parser import parse_config


NUM_SAMPLES, NUM_PROMPTS = 3072, 72
# Options of `examples.shapes.clips`; the mixture is that of the pretraining's last phase.
CLIPS = {
    "mixture": ["--num_clips", "1024", *clips_options(), "--seed", "11"],
    "labelled": ["--num_clips", "2048", "--good_share", "0.5", "--seed", "21"],
    "good": ["--num_clips", "512", "--good_share", "1", "--seed", "12"],
    "held_out": ["--num_clips", "24", "--split", "held_out", "--seed", "13"],
}


def input_stages(root: Path) -> list[Stage]:
    """The commands that make the inputs."""
    manifests = {name: root / "clips" / name / "manifest.json" for name in CLIPS}
    manifests |= {f"samples_{part}": root / "labels" / f"{part}.json" for part in ("train", "validation")}
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
        Stage(
            "latents",
            "latents of all of them",
            [
                launch(
                    "preprocess",
                    ["--manifest", str(manifest), "--output_dir", str(root / "latents" / name)],
                    two_processes=True,
                )
                for name, manifest in manifests.items()
            ],
            ["latents"],
        ),
    ]


def make_inputs(root: Path, seeds: Sequence[int]) -> None:
    """Make what is not there yet."""
    write_prompts(root / "sample_prompts.json", "train", NUM_SAMPLES, first_seed=100_000)
    for seed in seeds:
        write_prompts(root / f"prompts_{seed}.json", "held_out", NUM_PROMPTS, first_seed=1000 * (seed + 1))
    run_stages(input_stages(root), root, fresh=False)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ExperimentConfig, argv, description=__doc__)
    make_inputs(Path(config.output_dir), config.seeds)


if __name__ == "__main__":
    main()
