"""SHA-256 of many files, which the processes of a run divide among them."""

from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import gather_object

from ..runtime.distributed import process_state
from .hashes import FileHashes, hash_file


def hash_files(paths: Iterable[Path]) -> FileHashes:
    """Hashes of the files that exist. All processes must call it; each reads a part of them."""
    state = process_state()
    present = sorted({path for path in paths if path.is_file()})
    share = [(path, hash_file(path)) for path in present[state.process_index :: state.num_processes]]
    return FileHashes(gather_object(share))
