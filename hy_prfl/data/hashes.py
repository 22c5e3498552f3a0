"""SHA-256 of texts and files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import gather_object

from ..runtime.distributed import process_state


class FileHashes(dict[Path, str]):
    """SHA-256 of files by path; each file is read once, at its first lookup."""

    def __missing__(self, path: Path) -> str:
        self[path] = hash_file(path)
        return self[path]


def hash_files(paths: Iterable[Path]) -> FileHashes:
    """Hashes of those files that exist. All processes must call this; each reads a part of the files."""
    state = process_state()
    present = sorted({path for path in paths if path.is_file()})
    share = [(path, hash_file(path)) for path in present[state.process_index :: state.num_processes]]
    return FileHashes(gather_object(share))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
