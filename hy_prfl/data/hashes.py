"""SHA-256 of texts and files."""

import hashlib
from pathlib import Path


class FileHashes(dict[Path, str]):
    """SHA-256 of files by path; each file is read once, at its first lookup."""

    def __missing__(self, path: Path) -> str:
        self[path] = hash_file(path)
        return self[path]


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
