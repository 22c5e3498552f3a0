"""An append-only file of judgements. What `append` has returned from is on the disk, whatever happens next."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


FORMAT = 1


class Journal:
    """
    JSON Lines that only grow: one line for each event, synced to the disk before `append` returns.

    The file is locked for as long as it is open, so two servers cannot write to it. A last line that a killed process
    left unfinished was never acknowledged to anyone; it is cut off when the file is opened.

    Args:
        path (`Path`): The file. It is made if it is not there.

    Attributes:
        events (`list[dict]`): All events so far, oldest first.

    Raises:
        ValueError: If another process has the file open, or a line other than the last is broken; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not path.exists()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._lock()
            self.events = self._read()
            if is_new:
                _sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, event: dict[str, Any]) -> None:
        """
        Write an event and wait until the disk has it.

        Raises:
            OSError: If the disk did not take it. The file is then as it was before.
        """
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self.events.append(event)

    def clear(self) -> None:
        """Remove all events. For a journal in which nobody has judged anything yet."""
        os.ftruncate(self._descriptor, 0)
        self.events = []

    def close(self) -> None:
        """Close the file and let others open it."""
        os.close(self._descriptor)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"'{self.path}' is in use by another process; two must not write to it.") from error

    def _read(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):
            os.ftruncate(self._descriptor, len(complete))
        events = []
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number}: not valid JSON: {error}.") from error
            if not isinstance(event, dict) or "type" not in event:
                raise ValueError(f"{self.path}, line {number}: expected an object with `type`, got {line[:80]!r}.")
            events.append(event)
        return events


def _sync_folder(folder: Path) -> None:
    """Sync the folder, so that the name of a new file survives a power failure as its content does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
