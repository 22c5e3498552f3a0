"""Options of `report`."""

from dataclasses import dataclass, field

from .base import Config, check


@dataclass(kw_only=True)
class ReportConfig(Config):
    """Options of `report`: one HTML file that shows a run."""

    run: str = field(
        metadata={"help": "Folder of a reward or PRFL run. On the command line, `--run` may be left out before it."}
    )
    output: str | None = field(
        default=None, metadata={"help": "HTML file to write; report.html in the run's folder if left out."}
    )
    title: str | None = field(default=None, metadata={"help": "Headline; the folder's name if left out."})
    plan: str | None = field(
        default=None,
        metadata={"help": "File that `plan --output` wrote for the recipe. The measured cost is compared with it."},
    )
    scores: str | None = field(
        default=None,
        metadata={"help": "Table of `score` for labelled clips with the run's reward model, to show its calibration."},
    )
    before: str | None = field(default=None, metadata={"help": "Folder of `generate`, before the run."})
    after: str | None = field(
        default=None, metadata={"help": "Folder of `generate` with the same prompts and seeds, after the run."}
    )
    comparisons: list[str] | None = field(
        default=None,
        metadata={"help": "Results of `compare`. comparison.json in the run's folder is always shown if it exists."},
    )
    num_samples: int = field(default=6, metadata={"help": "Largest number of prompts whose videos are shown."})
    max_megabytes: float = field(default=50.0, metadata={"help": "Largest size of all videos in the page, in MB."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.output is None or self.output.endswith(".html"), "output", self.output, "a .html file")
        check((self.before is None) == (self.after is None), "before", self.before, "given with `after`, or neither")
        check(self.num_samples >= 0, "num_samples", self.num_samples, "at least 0")
        check(self.max_megabytes >= 0, "max_megabytes", self.max_megabytes, "at least 0")
