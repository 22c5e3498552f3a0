"""Options of `annotate`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from .base import check
from .serving import ServingConfig


@dataclass(kw_only=True)
class AnnotateConfig(ServingConfig):
    """
    Options of `annotate`: a web page on which people label the clips of a manifest.

    > Parameters of the input and output
    > Parameters of the questions
    > Parameters of the assignment of clips to people
    > Parameters of the votes
    """

    # Parameters of the input and output
    manifest: str = field(
        metadata={"help": "Clips to label: .json, .jsonl or .csv, as for `preprocess` or written by `generate`."}
    )
    output: str = field(
        metadata={
            "help": "JSON file to write, for `label` and `preprocess`. <output>.journal.jsonl is written too, with every "
            "answer, and <output>.summary.json, with agreement and pace."
        }
    )
    import_label_studio: str | None = field(
        default=None, metadata={"help": "JSON export of Label Studio. Its annotations are added to the journal."}
    )
    export_label_studio: str | None = field(
        default=None, metadata={"help": "JSON file to write clips and answers to, for Label Studio's import."}
    )

    # Parameters of the questions
    mode: Literal["clips", "pairs"] = field(
        default="clips", metadata={"help": "Judge single clips, or compare the two clips of each `pair_id`."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["physics_quality", "human_quality"],
        metadata={
            "help": "Qualities of a clip to label: text_alignment, blur_quality, physics_quality, human_quality, or your "
            "own names. Not used for pairs."
        },
    )

    # Parameters of the assignment of clips to people
    labels_per_clip: int = field(default=1, metadata={"help": "Number of people who judge each clip or pair."})
    order: Literal["random", "uncertain", "manifest"] = field(
        default="random",
        metadata={"help": "Order of the clips: random, those with the most uncertain scores first, or as listed."},
    )
    scores: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tables of `score` for order `uncertain`. With one table, clips with a reward near 0.5 come first; with "
            "several, from an ensemble, clips whose rewards differ most."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random order."})
    gold: str | None = field(
        default=None,
        metadata={
            "help": "File, as for `label`, with the correct labels of some clips of the manifest; for mode pairs, as this command "
            "writes it, with the worse clip of a pair as `rejected_id`. These clips are shown to everybody among the others, to "
            "measure annotators."
        },
    )
    gold_share: float = field(default=0.1, metadata={"help": "Share of gold clips among those shown."})

    # Parameters of the votes
    vote: Literal["majority", "unanimous"] = field(
        default="majority",
        metadata={"help": "A label is the answer of the majority, or of everybody; otherwise it stays missing."},
    )
    min_votes: int = field(
        default=1, metadata={"help": "Fewest answers for a label; with fewer answers it stays missing."}
    )
    min_gold_accuracy: float | None = field(
        default=None,
        metadata={"help": "Leave out the labels of people whose accuracy on gold clips is below this, in (0, 1]."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.output.endswith(".json"), "output", self.output, "a .json file")
        check(bool(self.tasks) and len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "different names")
        for task in self.tasks:
            check(
                re.fullmatch(r"[a-z][a-z0-9_]{0,63}", task) is not None, "tasks", task, "lower case words joined by _"
            )
            check(
                task != "motion_quality",
                "tasks",
                task,
                "physics_quality and human_quality, from which motion_quality is derived",
            )
        for name in ("labels_per_clip", "min_votes"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.min_votes <= self.labels_per_clip, "min_votes", self.min_votes, "at most `labels_per_clip`")
        check(
            (self.order == "uncertain") == bool(self.scores),
            "scores",
            self.scores,
            "given for order uncertain, and left out otherwise",
        )
        check(0 < self.gold_share < 1, "gold_share", self.gold_share, "in (0, 1)")
        if self.min_gold_accuracy is not None:
            value = self.min_gold_accuracy
            check(0 < value <= 1 and self.gold is not None, "min_gold_accuracy", value, "in (0, 1], with `gold` given")
