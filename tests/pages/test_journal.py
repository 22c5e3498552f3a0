"""What `append` has returned from is on the disk."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hy_prfl.pages.journal import Journal


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """As on a full disk: the system refuses to let any file grow past this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_events_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append({"type": "label", "text": f"é\u2028\n{number}"})
            assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == journal.events
    with Journal(path) as journal:
        assert [event["text"] for event in journal.events] == [f"é\u2028\n{number}" for number in range(3)]


@pytest.mark.parametrize("torn", [b'{"type": "la', b'{"type": "label"}', b"\xc3"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"type": "study"}\n' + torn)
    with Journal(path) as journal:
        assert journal.events == [{"type": "study"}]
        journal.append({"type": "skip"})
    assert path.read_bytes() == b'{"type": "study"}\n{"type": "skip"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no", "not valid JSON"),
        ("[1]", "expected an object with `type`"),
        ("[" * 100000 + "]" * 100000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_an_error(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"type": "study"}}\n{line}\n{{"type": "skip"}}\n')
    with pytest.raises(ValueError, match=f"journal.jsonl, line 2: {words}"):
        Journal(path)
    # The lock is gone with the error.
    path.write_text("")
    Journal(path).close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"type": "label", "text": "a"})
        before = path.read_bytes()
        with full_disk(len(before) + 10), pytest.raises(OSError, match="File too large"):
            journal.append({"type": "label", "text": "b" * 100})
        assert path.read_bytes() == before
        journal.append({"type": "label", "text": "c"})
    with Journal(path) as journal:
        assert [event["text"] for event in journal.events] == ["a", "c"]


def test_another_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        f"import fcntl; file = open({str(path)!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="is in use by another process"):
            Journal(path)
        process.communicate("\n")
    Journal(path).close()
