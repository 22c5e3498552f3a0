"""Opens latent datasets and selects rows with a label, pairs to compare, and an endless stream of batches."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from torch.utils.data import DataLoader

from .collators import Batch
from .sampler import BucketBatchSampler
from .schema import (
    LABELS,
    PROMPTS,
    TENSORS,
    latent_features,
    pack_tensor,
    table_to_rows,
    task_label,
    validate_columns,
)


logger = logging.getLogger(__name__)

# Worker processes pass their batches through shared memory.
SHARED_MEMORY = Path("/dev/shm")
# Batches that each worker process prepares.
PREFETCHED_BATCHES = 2

BatchT = TypeVar("BatchT")
Row = dict[str, Any]


def load_latent_dataset(path: str) -> Dataset:
    """
    Open a latent dataset: a folder written by `preprocess`, or a name for `datasets.load_dataset`.

    Raises:
        ValueError: If it is a folder of other files, has several splits, no rows, or lacks columns of a latent dataset.
        FileNotFoundError: If there is nothing of that name.
    """
    folder = Path(path)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = load_from_disk(path)
    elif folder.is_dir() and not any(folder.iterdir()):
        raise FileNotFoundError(f"{path}: the folder is empty, there is no latent dataset in it.")
    else:
        try:
            dataset = load_dataset(path)
        except (FileNotFoundError, ConnectionError, DatasetsError, ValueError) as error:
            if not folder.is_dir() and isinstance(error, FileNotFoundError | ConnectionError):
                raise FileNotFoundError(
                    f"{path}: there is no such folder, and no such dataset could be loaded from the Hub."
                ) from error
            what = "the folder" if folder.is_dir() else "what was loaded from the Hub"
            # An error while the files are read has the reason as its cause.
            reason = shorten(str(error.__cause__ or error), 300)
            raise ValueError(f"{path}: {what} is not a latent dataset: {reason}") from error
    if isinstance(dataset, DatasetDict):
        if len(dataset) != 1:
            raise ValueError(f"{path}: expected one split, found {', '.join(dataset)}. Save the split you want.")
        dataset = next(iter(dataset.values()))
    return as_latent_dataset(dataset, path)


def as_latent_dataset(dataset: Dataset, source: str) -> Dataset:
    """
    Prepare a dataset that was opened elsewhere: set the format in which this package reads rows.

    Raises:
        ValueError: If it has no rows, or lacks columns of a latent dataset.
    """
    validate_columns(dataset.column_names, source)
    if len(dataset) == 0:
        raise ValueError(f"{source}: the dataset has no rows.")
    return dataset.with_format("arrow")


def pool_datasets(datasets: Sequence[Dataset], sources: Sequence[str]) -> Dataset:
    """
    One latent dataset of the rows of several, in their order; nothing is copied on the disk.

    Args:
        datasets (`Sequence[Dataset]`):
            Latent datasets, as [`as_latent_dataset`] returns them.
        sources (`Sequence[str]`):
            Their names, for messages.

    Raises:
        ValueError: If two of them share the id of a row, store tensors in different types, or have prompts of different
            text encoders.
    """
    if len(datasets) == 1:
        return datasets[0]
    source_of: dict[str, str] = {}
    for dataset, source in zip(datasets, sources, strict=True):
        ids = set(dataset.unique("id"))
        shared = sorted(ids & set(source_of))
        if shared:
            raise ValueError(
                f"{source}: row '{shared[0]}' has the same id as a row of {source_of[shared[0]]}; {len(shared)} of "
                f"{len(ids)} rows share an id with another dataset. Ids must be unique over all datasets."
            )
        source_of |= dict.fromkeys(ids, source)
    first, *others = zip(datasets, sources, strict=True)
    for dataset, source in others:
        for name in TENSORS:
            types = [each.features[name].feature.dtype for each in (first[0], dataset)]
            if types[0] != types[1]:
                raise ValueError(
                    f"{source}: `{name}` is {types[1]}, in {first[1]} it is {types[0]}. Encode one of them with the "
                    "`tensor_dtype` of the other."
                )
        encoders = [set(each.unique("text_encoder_fingerprint")) - {None, ""} for each in (first[0], dataset)]
        if all(encoders) and encoders[0] != encoders[1]:
            found = [", ".join(sorted(each)) for each in encoders]
            raise ValueError(
                f"{source}: prompts of another text encoder than those of {first[1]}: `text_encoder_fingerprint` {found[1]} "
                f"against {found[0]}."
            )
    columns = list(latent_features())
    return concatenate_datasets([dataset.select_columns(columns) for dataset in datasets])


def short_names(sources: Sequence[str]) -> list[str]:
    """Names of datasets for messages and metrics: the ends of their paths, as long as is needed to tell them apart."""
    parts = [re.split(r"[/\\]+", source.rstrip("/\\")) for source in sources]
    names = [each[-1] for each in parts]
    for length in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["_".join(each[-length:]) for each in parts]
    return names if len(set(names)) == len(names) else list(sources)


def read_columns(dataset: Dataset, names: Sequence[str]) -> list[Row]:
    """The named small columns of every row, without reading the tensors."""
    return dataset.select_columns(list(names)).with_format(None).to_list()


def rows_digest(dataset: Dataset) -> str:
    """Short hash of the rows for training. It changes if their order, clips, labels or pairs change."""
    names = ["id", "prompt", "source_hash", "latents_shape", *LABELS, "pair_id", "rejected_id"]
    rows = read_columns(dataset, names)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def latent_shapes(dataset: Dataset) -> list[tuple[int, ...]]:
    """Shape `(num_channels, num_frames, height, width)` of every row's latents."""
    return [tuple(row["latents_shape"]) for row in read_columns(dataset, ["latents_shape"])]


def single_value(dataset: Dataset, name: str, source: str) -> Any:
    """
    The value of a column in which all rows must be equal.

    Raises:
        ValueError: If rows differ. A dataset must come from one VAE and one text encoder, with one sequence length.
    """
    values = set(dataset.unique(name))
    if len(values) != 1:
        raise ValueError(f"{source}: all rows must have the same `{name}`, found {sorted(map(str, values))}.")
    return values.pop()


def require_latents(dataset: Dataset, source: str) -> None:
    """Raise a `ValueError` if any row has no latents, as in a prompt-only dataset."""
    empty = len(dataset) - len(rows_with_latents(dataset))
    if empty:
        raise ValueError(f"{source}: {empty} of {len(dataset)} rows have no latents; encoded videos are needed.")


def rows_with_latents(dataset: Dataset) -> list[int]:
    """Indices of the rows that have latents."""
    tables = dataset.select_columns(["latents"]).with_format("arrow").iter(batch_size=64)
    has_latents = [value for table in tables for value in table.column("latents").is_valid().to_pylist()]
    return [index for index, value in enumerate(has_latents) if value]


def rows_with_label(dataset: Dataset, task: str, source: str) -> tuple[list[int], list[int]]:
    """
    Rows whose label for `task` is known, and their labels. The number of rows that are left out is logged.

    Raises:
        ValueError: If no row has that label.
    """
    columns = ["physics_quality", "human_quality"] if task == "motion_quality" else [task]
    labels = [task_label(row, task) for row in read_columns(dataset, columns)]
    indices = [index for index, label in enumerate(labels) if label is not None]
    known = [label for label in labels if label is not None]
    if not known:
        raise ValueError(f"{source}: no row has a label for the task '{task}'.")
    logger.info(
        "%s: %d rows are good, %d poor and %d have no label for '%s' and are left out.",
        source, sum(known), len(known) - sum(known), len(labels) - len(known), task,
    )  # fmt: skip
    return indices, known


def preference_pairs(
    dataset: Dataset, task: str, source: str, *, allow_unpaired: bool = False, seed: int = 0
) -> list[tuple[int, int]]:
    """
    Pairs `(chosen, rejected)` of row indices; both rows have the same shape.

    A row with a `rejected_id` is compared with that row. Other rows are grouped by their `pair_id`, or by their prompt
    if they have none; in a group, every good row is compared with every poor one. If the dataset has no such pair and
    `allow_unpaired` is set, each good row is compared with a random poor row of the same shape and any prompt, as
    upstream does.

    Raises:
        ValueError: If a `rejected_id` names no row, or there is no pair at all.
    """
    columns = ["id", "prompt", "pair_id", "rejected_id", "latents_shape", "physics_quality", "human_quality"]
    columns += [] if task == "motion_quality" else [task]
    rows = read_columns(dataset, list(dict.fromkeys(columns)))
    shapes = [tuple(row["latents_shape"]) for row in rows]
    labels = [task_label(row, task) for row in rows]

    pairs = _explicit_pairs(rows, source)
    in_pairs = {index for pair in pairs for index in pair}
    groups: dict[Hashable, dict[int | None, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, row in enumerate(rows):
        if index not in in_pairs:
            scene = ("pair", row["pair_id"]) if row["pair_id"] is not None else ("prompt", row["prompt"])
            groups[scene][labels[index]].append(index)
    pairs += [(good, poor) for group in groups.values() for good in group[1] for poor in group[0]]

    same_shape = [(good, poor) for good, poor in pairs if shapes[good] == shapes[poor]]
    if len(same_shape) < len(pairs):
        logger.warning("%s: %d pairs of clips of different shape are left out.", source, len(pairs) - len(same_shape))
    if not same_shape and allow_unpaired:
        same_shape = _random_pairs(labels, shapes, seed)
        logger.warning("%s: no clips share a prompt; %d good clips are compared with random poor ones.", source, len(same_shape))  # fmt: skip
    if not same_shape:
        raise ValueError(
            f"{source}: no good and poor clip for '{task}' share a pair id, a prompt and a shape. "
            "`allow_unpaired` compares clips of different prompts."
        )
    logger.info("%s: %d pairs.", source, len(same_shape))
    return same_shape


def _explicit_pairs(rows: Sequence[Row], source: str) -> list[tuple[int, int]]:
    position = {row["id"]: index for index, row in enumerate(rows)}
    pairs = []
    for index, row in enumerate(rows):
        if row["rejected_id"] is not None:
            if row["rejected_id"] not in position:
                raise ValueError(
                    f"{source}: row '{row['id']}' names '{row['rejected_id']}' in `rejected_id`, "
                    "which is not in the dataset."
                )
            pairs.append((index, position[row["rejected_id"]]))
    return pairs


def _random_pairs(labels: Sequence[int | None], shapes: Sequence[tuple[int, ...]], seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    poor_by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        if label == 0:
            poor_by_shape[shapes[index]].append(index)
    return [
        (index, int(rng.choice(poor_by_shape[shapes[index]])))
        for index, label in enumerate(labels)
        if label == 1 and poor_by_shape[shapes[index]]
    ]


class RowDataset(torch.utils.data.Dataset[Any]):
    """Rows of a latent dataset by index, or pairs of rows if an item of `items` is a pair of indices."""

    def __init__(self, dataset: Dataset, items: Sequence[int] | Sequence[tuple[int, int]]) -> None:
        self.dataset = dataset
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Row | tuple[Row, Row]:
        item = self.items[index]
        if isinstance(item, tuple):
            chosen, rejected = (table_to_rows(self.dataset[row])[0] for row in item)
            return chosen, rejected
        return table_to_rows(self.dataset[item])[0]


def stream_batches(
    rows: RowDataset,
    collate: Callable[[list[Any]], BatchT],
    sampler: BucketBatchSampler,
    *,
    num_workers: int = 0,
) -> Iterator[BatchT]:
    """Endless batches in the sampler's order. [`check_shared_memory`] checks early whether they fit."""
    return iter(
        DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            # A new loader draws a seed. From the global generator, this would change the random numbers of a resumed run.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
    )


def check_shared_memory(
    rows: RowDataset, collate: Callable[[list[Any]], Batch], sampler: BucketBatchSampler, *, num_workers: int
) -> None:
    """
    Check that the batches of all worker processes fit into shared memory. Otherwise a run ends with a bus error.

    Docker gives a container 64 MB of shared memory by default.

    Args:
        rows, collate, sampler, num_workers:
            As in [`stream_batches`].

    Raises:
        ValueError: If the batches of all workers on this machine are larger than the free shared memory.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return
    prompts = _longest_prompts(rows.dataset)
    largest = 0
    for bucket in sampler.buckets:
        item = rows[bucket[0]]
        item = (item[0] | prompts, item[1] | prompts) if isinstance(item, tuple) else item | prompts
        largest = max(largest, collate([item]).nbytes)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = largest * sampler.batch_size * PREFETCHED_BATCHES * num_workers * num_processes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"`dataloader_num_workers` {num_workers}: with {num_processes} processes on this machine their batches take "
            f"{needed / 1e6:.0f} MB of shared memory, but {SHARED_MEMORY} has {free / 1e6:.0f} MB free. Give the container "
            "more (`docker run --shm-size 16g`), or set `dataloader_num_workers` to 0."
        )


def _longest_prompts(dataset: Dataset) -> Row:
    """Columns of prompts of zeros with the largest size in the dataset: a batch may pad its prompts to this size."""
    rows = read_columns(dataset, [f"{name}_shape" for name in PROMPTS])
    prompts: Row = {}
    for name in PROMPTS:
        shapes = [row[f"{name}_shape"] for row in rows if row[f"{name}_shape"] is not None]
        if shapes:
            dtype = dataset.features[name].feature.dtype
            prompts |= pack_tensor(name, np.zeros(max(shapes), dtype), dtype, source=name)
    return prompts
