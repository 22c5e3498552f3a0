"""Reads and writes files of weights, with errors that name file and tensor. Knows nothing about models."""

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..runtime.atomic_writes import temporary_folder


StateDict = dict[str, torch.Tensor]

# Keys that upstream's own loaders unwrap in a pickled checkpoint.
CHECKPOINT_WRAPPERS = ("module", "state_dict")


def check_keys(found: Iterable[str], expected: Iterable[str], *, source: str) -> None:
    """Raise a `ValueError` that names missing and unexpected keys."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [
        f"{len(keys)} {word} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: keys do not fit: {' and '.join(problems)}.")


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], *, source: str) -> None:
    """Raise a `ValueError` that names the first tensor with a NaN or an infinity in it."""
    for key, tensor in weights:
        if not is_finite(tensor):
            raise ValueError(f"{source}: '{key}' holds a NaN or an infinity.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values of a tensor of any type are finite. Only a float8 tensor is copied for this."""
    if not tensor.numel() or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    lowest, highest = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def read_weights(path: str | Path) -> StateDict:
    """
    Read a model's weights: one file, or a folder with one safetensors file or shards and their index.

    Tensors are mapped from disk rather than copied.

    Raises:
        FileNotFoundError: If the file, the folder, its weights or one shard is missing.
        ValueError: If it is ambiguous which file to read, or a file is broken.
    """
    path = Path(path)
    if path.is_file():
        return read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{path}'.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{path}: {len(indices)} index files: {', '.join(index.name for index in indices)}.")
    if indices:
        return _read_shards(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: there is no safetensors file.")
    usual = [file for file in files if file.name == SAFETENSORS_WEIGHTS_NAME]
    if len(files) > 1 and not usual:
        raise ValueError(f"{path}: {len(files)} safetensors files without an index; which one is the model?")
    return read_safetensors((usual or files)[0])


def _read_shards(index: Path) -> StateDict:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: `weight_map` is missing.")
    weights: StateDict = {}
    for name in sorted(set(weight_map.values())):
        shard_path = index.parent / name
        if not shard_path.is_file():
            raise FileNotFoundError(f"{index.parent}: the shard '{name}' of {index.name} is missing.")
        shard = read_safetensors(shard_path)
        check_keys(shard, [key for key, file in weight_map.items() if file == name], source=str(shard_path))
        weights |= shard
    return weights


def read_safetensors(path: str | Path) -> StateDict:
    """
    All tensors of one safetensors file, mapped from disk rather than copied.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, or truncated.
    """
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of one safetensors file; for errors see [`read_safetensors`]."""
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def _open_safetensors(path: str | Path) -> safe_open:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def read_checkpoint(path: str | Path) -> StateDict:
    """
    Read a pickled state dict (`.ckpt`, `.pt`, `.pth`, `.bin`), without running code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a mapping of names to tensors, either directly or under `module` or `state_dict`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a checkpoint of torch 1.6 or later.")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of tensors alone: {error}") from error
    if isinstance(weights, Mapping) and len(weights) == 1 and next(iter(weights)) in CHECKPOINT_WRAPPERS:
        weights = next(iter(weights.values()))
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {type(weights).__name__}.")
    for key, value in weights.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{path}: expected a state dict, tensors by name, got the {type(key).__name__} {key!r} as a name."
            )
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: expected a state dict, but '{key}' is a {type(value).__name__}, not a tensor.")
    return dict(weights)


def read_json(path: str | Path) -> dict[str, Any]:
    """
    Read a JSON file that holds a mapping.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}.")
    return values


def check_output_dir(output_dir: str | Path) -> None:
    """Raise a `ValueError` if `output_dir` exists and is not an empty folder."""
    path = Path(output_dir)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"`output_dir` '{output_dir}' exists and is not an empty folder.")


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    A temporary folder to write into. It is renamed to `output_dir` when the block ends without an error.

    Raises:
        ValueError: If `output_dir` exists and is not an empty folder.
    """
    check_output_dir(output_dir)
    target = Path(output_dir).absolute()
    unfinished = temporary_folder(target)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
