"""Tells whether a model, a dataset or a list on the disk is still the one that a result was made from."""

import hashlib
import json
from pathlib import Path


def path_identity(path: str, revision: str | None = None) -> str:
    """
    Short text that changes when the files behind a path do, without reading them.

    For a local file or folder it is a hash of the names, sizes and times of its files, so it survives that the folder
    is moved or named in another way. A Hub id stands for itself, with its revision.
    """
    root = Path(path)
    if not root.exists():
        return path if revision is None else f"{path}@{revision}"
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    states = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
