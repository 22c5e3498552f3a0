r"""
Serves a web page on which people label clips, or compare pairs of clips.

    hy-prfl annotate --manifest outputs/videos/manifest.json --output labels.json

Every answer is on the disk before the next clip is shown. Run the same command again to continue after a stop.
"""

from collections.abc import Sequence
from pathlib import Path

from ..configs.annotate import AnnotateConfig
from ..configs.inputs import check_files
from ..configs.outputs import check_output_files
from ..configs.parser import parse_config
from ..configs.serving import check_overwrites
from .running import run


# Questions for the tasks that this package knows.
QUESTIONS = {
    "text_alignment": "Does the clip show what the caption says?",
    "blur_quality": "Is the picture sharp and free of flicker? Good is sharp.",
    "physics_quality": "Do objects and people move as in the real world?",
    "human_quality": "Are bodies, faces and hands complete and correctly shaped in every frame?",
}
PAIR_QUESTION = "Which clip shows the caption better overall?"
INSTRUCTIONS = (
    "Watch the whole clip at least once before you answer. Judge what you see, not what you would have liked to see. "
    'Answer "unsure" if you cannot decide. Do not guess.'
)
PAIR_INSTRUCTIONS = (
    'Watch both clips to their end at least once before you answer. The sides are random. Answer "tie" if neither clip '
    "is better."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until it is stopped, then write the result."""
    config = parse_config(AnnotateConfig, argv, description=__doc__)
    check_files(config, "manifest", "scores", "gold", "instructions", "import_label_studio")
    check_output_files(config, "output", "export_label_studio")
    journal_path, summary_path = Path(f"{config.output}.journal.jsonl"), Path(f"{config.output}.summary.json")
    inputs = {
        f"`{name}`": getattr(config, name) for name in ("manifest", "gold", "instructions", "import_label_studio")
    }
    inputs |= {f"table {number} of `scores`": path for number, path in enumerate(config.scores or [], 1)}
    outputs = {f"`{name}`": getattr(config, name) for name in ("output", "export_label_studio")}
    check_overwrites(
        inputs,
        outputs | {"the journal of `output`": str(journal_path), "the summary of `output`": str(summary_path)},
    )

    # Imported here, so that a misspelt option is reported before libraries are loaded.
    from ..data.manifest import read_manifest
    from ..pages.annotation import (
        PREFERENCE,
        check_videos,
        clip_items,
        clip_rows,
        order_items,
        pair_items,
        pair_rows,
        read_scores,
        summarize,
        write_json,
    )
    from ..pages.gold import read_gold, read_gold_pairs, trusted_annotators, with_gold
    from ..pages.journal import Journal
    from ..pages.label_studio import export_tasks, import_tasks
    from ..pages.study import Study
    from ..runtime.messages import set_up_logging
    from .serving import serve_study

    set_up_logging()
    rows = read_manifest(config.manifest)
    check_videos(rows)
    is_pairs = config.mode == "pairs"
    items = pair_items(rows) if is_pairs else clip_items(rows)
    if config.gold is not None:
        gold = read_gold_pairs(config.gold, items) if is_pairs else read_gold(config.gold, rows, config.tasks)
        items = with_gold(items, gold)
    items = order_items(items, config.order, seed=config.seed, tables=read_scores(config.scores or []))
    questions = [PREFERENCE] if is_pairs else config.tasks
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)

    with Journal(journal_path) as journal:
        study = Study(
            journal,
            items,
            kind=config.mode,
            questions=questions,
            labels_per_item=config.labels_per_clip,
            gold_share=0.0 if config.gold is None else config.gold_share,
            inputs={"manifest": str(Path(config.manifest).resolve())},
        )
        if config.import_label_studio is not None:
            added, known = import_tasks(study, config.import_label_studio)
            print(f"{added} annotations added, {known} were there already: {config.import_label_studio}")

        def save(now: Study) -> None:
            people = trusted_annotators(now, config.min_gold_accuracy)
            rule, min_votes = config.vote, config.min_votes
            to_rows = pair_rows if is_pairs else clip_rows
            write_json(output, to_rows(now, rows, output.parent, rule=rule, min_votes=min_votes, annotators=people))
            summary = summarize(now, rule=rule, min_votes=min_votes, annotators=people)
            write_json(summary_path, summary)
            if config.export_label_studio is not None:
                write_json(Path(config.export_label_studio), export_tasks(now))

        default = PAIR_INSTRUCTIONS if is_pairs else INSTRUCTIONS
        texts = {PREFERENCE: PAIR_QUESTION} | QUESTIONS
        shown = {name: texts.get(name, "Is the clip good or poor in this respect?") for name in questions}
        serve_study(
            study, config, save, title="Compare clips" if is_pairs else "Label clips", default=default, questions=shown
        )
        print(f"{len(study.labels)} labels of {len({label['annotator'] for label in study.labels})} people: {output}")


if __name__ == "__main__":
    run(main)
