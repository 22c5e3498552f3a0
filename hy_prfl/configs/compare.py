"""Options of `compare`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from .base import check
from .serving import ServingConfig


@dataclass(kw_only=True)
class CompareConfig(ServingConfig):
    """
    Options of `compare`: a web page on which people compare two generators, without knowing which is which.

    > Parameters of the input and output
    > Parameters of the study
    """

    # Parameters of the input and output
    left: str = field(metadata={"help": "Folder of `generate`, for example the base model's."})
    right: str = field(metadata={"help": "Folder of `generate` with the same prompts and seeds, of the other model."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the result; comparison.json in the folder of `right` if left out. "
            "<output>.journal.jsonl is written too, with every answer."
        },
    )

    # Parameters of the study
    criteria: list[str] = field(
        default_factory=lambda: ["preference"], metadata={"help": "Names of the criteria that clips are compared by."}
    )
    labels_per_pair: int | None = field(
        default=None, metadata={"help": "Number of people who judge each pair. Everybody judges all if left out."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the pairs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            self.output = str(Path(self.right) / "comparison.json")
        check(self.output.endswith(".json"), "output", self.output, "a .json file")
        names = self.criteria
        check(bool(names) and len(set(names)) == len(names), "criteria", names, "different names")
        for name in names:
            fits = re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) is not None
            check(fits, "criteria", name, "lower case words joined by _")
        number = self.labels_per_pair
        check(number is None or number >= 1, "labels_per_pair", number, "at least 1")
