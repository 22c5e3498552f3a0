r"""
Serves a web page on which people compare the videos of two generators, and writes which one they prefer.

    hy-prfl generate --prompts prompts.json --output_dir outputs/base ...
    hy-prfl generate --prompts prompts.json --output_dir outputs/prfl --lora_path outputs/run ...
    hy-prfl compare --left outputs/base --right outputs/prfl

Every answer is on the disk before the next pair is shown. Run the same command again to continue after a stop.
"""

from collections.abc import Sequence
from pathlib import Path

from ..configs.compare import CompareConfig
from ..configs.inputs import check_files, check_paths
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.serving import check_overwrites
from .running import run


QUESTIONS = {
    "preference": "Which clip shows the caption better overall?",
    "text_alignment": "Which clip is closer to the caption?",
    "motion_quality": "In which clip do objects and people move more as in the real world?",
    "visual_quality": "Which clip has the better picture?",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until it is stopped, then write the result."""
    config = parse_config(CompareConfig, argv, description=__doc__)
    check_files(config, "instructions")
    check_paths(config, "left", "right")
    check_output_files(config, "output")
    journal_path = Path(f"{config.output}.journal.jsonl")
    # The file name is written out: to import it would load libraries before the options are checked.
    inputs = {f"the manifest of `{name}`": f"{getattr(config, name)}/manifest.json" for name in ("left", "right")}
    check_overwrites(
        inputs | {"`instructions`": config.instructions},
        {"`output`": config.output, "the journal of `output`": str(journal_path)},
    )

    # Imported here, so that a misspelt option is reported before libraries are loaded. None of them is torch.
    from ..pages.annotation import order_items, write_json
    from ..pages.comparison import compare, read_pairs
    from ..pages.journal import Journal
    from ..pages.study import Study
    from ..runtime.messages import set_up_logging
    from .annotate import PAIR_INSTRUCTIONS
    from .serving import serve_study

    set_up_logging()
    items = order_items(read_pairs(config.left, config.right), "random", seed=config.seed)
    output = Path(str(config.output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(journal_path) as journal:
        study = Study(
            journal,
            items,
            kind="pairs",
            questions=config.criteria,
            labels_per_item=config.labels_per_pair,
            inputs={name: str(Path(getattr(config, name)).resolve()) for name in ("left", "right")},
        )

        def save(now: Study) -> None:
            write_json(output, compare(now, config.left, config.right))

        shown = {name: QUESTIONS.get(name, "Which clip is better in this respect?") for name in config.criteria}
        serve_study(study, config, save, title="Compare clips", default=PAIR_INSTRUCTIONS, questions=shown)
        result = compare(study, config.left, config.right)
    print(f"left: {config.left}, right: {config.right}; {len(study.labels)} answers: {output}")
    for name, question in result["questions"].items():
        shares = [
            f"{side} {vote['share']:.1%}" for side, vote in question["votes"].items() if vote["share"] is not None
        ]
        print(f"  {name}: {', '.join(shares) or 'no answers yet'}")


if __name__ == "__main__":
    run(main)
