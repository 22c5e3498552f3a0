"""Finds the files that a list names: first from the working directory, as upstream does, then from the list's folder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ListedFiles:
    """
    Finds the files of one list.

    Args:
        list_path (`Path`):
            The list. Relative paths are looked up in the working directory, then in the folder of the list.
    """

    list_path: Path
    # Names that exist in both folders, in the order of the lookups. A dict keeps that order.
    in_both: dict[str, None] = field(default_factory=dict)

    def find(self, name: str | None) -> Path | None:
        """Path of a file; the path in the list's folder if it does not exist. None if `name` is None."""
        if name is None:
            return None
        here, beside = Path(name), self.list_path.parent / name
        if not here.is_file():
            return beside
        if beside.is_file() and not here.samefile(beside):
            self.in_both[name] = None
        return here

    def missing(self, *names: str | None) -> dict[Path, str]:
        """Error texts for files that do not exist, by the path that `find` returns."""
        missing: dict[Path, str] = {}
        for name in names:
            path = self.find(name)
            if name is not None and path is not None and not path.is_file():
                places = [Path.cwd() / name, Path.cwd() / self.list_path.parent / name]
                missing[path] = "there is " + describe_absence(places)
        return missing

    def warn_of_names_in_both(self) -> None:
        """Log names that exist in both folders, and which file is used."""
        if self.in_both:
            first, *others = self.in_both
            more = f" (and {len(others)} more)" if others else ""
            logger.warning(
                f"{self.list_path}: {first!r}{more} is both in '{Path.cwd()}', which is used, and in "
                f"'{Path.cwd() / self.list_path.parent}'."
            )


def describe_absence(places: Sequence[Path]) -> str:
    """`no file 'a'`, or `neither 'a' nor 'b'`."""
    quoted = [f"'{place}'" for place in dict.fromkeys(places)]
    return f"neither {' nor '.join(quoted)}" if len(quoted) > 1 else f"no file {quoted[0]}"
