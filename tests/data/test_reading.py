"""Reading ahead: the order and the errors of `map`, no more than was asked for, nothing left behind."""

import threading
from contextlib import closing
from pathlib import Path

import pytest

from hy_prfl.data.manifest import ManifestRow
from hy_prfl.data.pixels import VideoError
from hy_prfl.data.reading import RowReader, map_ahead


class Counter:
    """Squares numbers, and knows how many it has begun. Odd ones wait until the next even one is done."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.even = threading.Event()

    def __call__(self, number: int) -> int:
        self.begun.append(number)
        if number % 2:
            self.even.wait(5)
        else:
            self.even.set()
        if number == 7:
            raise OSError("seven")
        return number**2


def num_threads() -> int:
    return sum(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_order_and_errors_are_those_of_map(num_workers: int) -> None:
    found: list[int] = []
    with pytest.raises(OSError, match="seven"):
        found.extend(map_ahead(Counter(), range(20), num_workers=num_workers, num_ahead=4))
    assert found == [number**2 for number in range(7)]
    assert num_threads() == 0


def test_no_more_are_read_than_may_wait() -> None:
    """Also in the long run: an item is begun only when one has been taken."""
    counter = Counter()
    taken = 0
    with closing(map_ahead(counter, range(0, 100, 2), num_workers=2, num_ahead=3)) as values:
        for value in values:
            assert value == (2 * taken) ** 2
            taken += 1
            assert len(counter.begun) <= taken + 3
            if taken == 10:
                break
    assert num_threads() == 0
    assert len(counter.begun) <= 13


def test_with_no_worker_nothing_is_read_before_it_is_asked_for() -> None:
    counter = Counter()
    values = map_ahead(counter, range(0, 8, 2), num_workers=0, num_ahead=3)
    assert next(values) == 0
    assert counter.begun == [0]


def row(name: str) -> ManifestRow:
    return ManifestRow(where=name, id=name, prompt=name, video=Path(name))


class Source:
    """Rows of one letter and a number: equal letters are equal rows; `x` cannot be read, `-` has no key."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def row_key(self, row: ManifestRow) -> str:
        if row.id == "-":
            raise VideoError("no key")
        return row.id[0]

    def read_row(self, row: ManifestRow) -> str:
        self.read.append(row.id)
        if row.id == "x":
            raise VideoError("broken")
        return f"content of {row.id}"


def test_what_is_stored_or_has_been_read_is_not_read() -> None:
    source = Source()
    reader = RowReader(source, [row(name) for name in ("a1", "b1", "a2", "x", "-", "c1")], {"b"})
    a1, b1, a2, broken, nameless, c1 = (reader(position) for position in range(6))
    assert source.read == ["a1", "x", "c1"]
    assert [each.key for each in (a1, b1, a2, broken, c1)] == ["a", "b", "a", "x", "c"]
    assert str(nameless.key) == "no key"
    assert isinstance(nameless.key, VideoError)
    assert str(broken.take_content()) == "broken"
    assert (a1.take_content(), a2.take_content()) == ("content of a1", "content of a2")
    assert source.read == ["a1", "x", "c1", "a2"]
