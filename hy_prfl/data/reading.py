"""Reads the files of rows, in background threads if wanted, while models encode the rows before them."""

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from .manifest import ManifestRow
from .pixels import VideoError


Item = TypeVar("Item")
Result = TypeVar("Result")


class Reads(Protocol):
    """The reading methods of a `store.RowEncoder`. Both raise a `VideoError` for a bad clip."""

    def row_key(self, row: ManifestRow) -> str: ...

    def read_row(self, row: ManifestRow) -> Any: ...


class ReadRow:
    """
    A row whose files have been read.

    Args:
        position (`int`):
            Index of the row among all rows.
        key (`str` or `VideoError`):
            Hash of everything that its columns depend on, or the error of its clip.
        read (`Callable`):
            Function that returns the row's content, or the error of its clip.
    """

    def __init__(self, position: int, key: str | VideoError, read: Callable[[], Any]) -> None:
        self.position = position
        self.key = key
        self._read = read
        self._content: Any = None

    def read(self) -> None:
        """Read the content and keep it for `take_content`."""
        self._content = self._read()

    def take_content(self) -> Any:
        """The content. It is read now if `read` was not called before. The row does not keep it."""
        content, self._content = self._content, None
        return self._read() if content is None else content


class RowReader:
    """
    Reads rows: the key of each and, if no row with that key is stored or has been read, its content.

    It may be called from several threads. Two equal rows may then both be read.

    Args:
        reads (`store.RowEncoder`):
            Object that reads a row.
        rows (`Sequence[ManifestRow]`):
            All rows.
        known (`Collection[str]`):
            Keys of the stored rows. The caller may add keys at any time.
    """

    def __init__(self, reads: Reads, rows: Sequence[ManifestRow], known: Collection[str]) -> None:
        self.reads = reads
        self.rows = rows
        self.known = known
        self._seen: set[str] = set()

    def __call__(self, position: int) -> ReadRow:
        """Read the row at a position."""
        row = self.rows[position]
        key = _or_error(self.reads.row_key, row)
        result = ReadRow(position, key, lambda: _or_error(self.reads.read_row, row))
        if isinstance(key, str) and key not in self.known and key not in self._seen:
            self._seen.add(key)
            result.read()
        return result


def _or_error(function: Callable[[ManifestRow], Any], row: ManifestRow) -> Any:
    try:
        return function(row)
    except VideoError as error:
        return error


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, num_ahead: int
) -> Generator[Result, None, None]:
    """
    Like `map`, but threads compute the next results while the caller works. Order and exceptions are those of `map`.

    Args:
        num_workers (`int`):
            Number of threads. With 0, each result is computed when the caller requests it.
        num_ahead (`int`):
            Most results that are being computed, or wait, while the caller works on one.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Also when the caller was interrupted: calls that have started are finished, the others are cancelled.
        executor.shutdown(wait=True, cancel_futures=True)
