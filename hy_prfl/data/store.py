"""Builds a latent dataset from shards, so that a run that is killed at any time loses at most one shard of work."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from accelerate.logging import get_logger
from datasets import Dataset, DatasetInfo, Features
from tqdm import tqdm

from ..runtime.atomic_writes import recover_folder, replace_folder, replacing, temporary_folder, write_text
from ..runtime.distributed import process_state
from .finished import REPORT_FILE, STATE_FILE, check_dropped, dropped_clips
from .hashes import hash_text
from .manifest import ManifestRow
from .reading import ReadRow, RowReader, map_ahead
from .schema import LABELS, latent_features, rows_to_table
from .video import VideoError


logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """
    Numbers of `build_dataset`: rows in the dataset, rows among them that this run encoded, bad clips that were left out,
    and clips of the previous dataset that were dropped.
    """

    num_rows: int
    num_encoded: int
    num_bad: int
    num_dropped: int = 0


class RowEncoder(Protocol):
    """Makes rows of a latent dataset."""

    def row_key(self, row: ManifestRow) -> str:
        """Hash of everything that the encoded columns of a row depend on. Raises a `VideoError` for a bad clip."""

    def read_row(self, row: ManifestRow) -> Any:
        """
        Content of a row's files, for `encode_rows`. Raises a `VideoError` for a bad clip.

        Like `row_key`, it uses no model and may be called from several threads at the same time.
        """

    def encode_rows(self, rows: Sequence[ManifestRow], contents: Sequence[Any]) -> list[dict[str, Any] | VideoError]:
        """
        For each row its columns, or the error of a bad clip.

        Columns are without id, source and labels. Tensors are packed by `schema.pack_tensor`. The entry `remarks` is a
        list of texts about the clip for the report.

        Args:
            contents (`Sequence[Any]`):
                Result of `read_row` for each row.
        """


def build_dataset(
    rows: Sequence[ManifestRow],
    row_encoder: RowEncoder,
    output_dir: Path,
    *,
    digest: str,
    settings: Mapping[str, Any] | None = None,
    tensor_dtype: str = "float16",
    shard_size: int = 8,
    batch_size: int = 1,
    num_workers: int = 0,
    overwrite: bool = False,
) -> DatasetSummary | None:
    """
    Encode rows, sharded over the processes of `accelerate`, into a folder that `datasets.load_from_disk` reads.

    All processes must see the same folder. Encoded rows are collected in shards in `<output_dir>.partial`. Every row is
    stored under a hash of everything that it depends on. So a run that was killed, or whose manifest, settings or encoder
    changed, encodes only the missing rows. Rows of a dataset that is already in `output_dir` are reused too. It stays in
    place until the new one is finished. The dataset has the good rows in the order of `rows`. `report.jsonl` lists the
    bad ones, and remarks on good ones.

    Args:
        row_encoder (`RowEncoder`):
            A `preprocessing.ClipEncoder` or an `upstream.UpstreamImporter`.
        digest (`str`):
            `request_digest(...)`. It is stored, so that the finished dataset is recognised later.
        settings (`Mapping`, *optional*):
            Options that the rows depend on. They are stored, so that differences can be reported later.
        shard_size (`int`, defaults to 8):
            Rows per shard. At most this many, or one batch, are lost if the process is killed.
        batch_size (`int`, defaults to 1):
            Rows that are encoded together.
        num_workers (`int`, defaults to 0):
            Threads in each process that read the next rows while others are encoded. With 0, rows are read one by one.
            The result is the same. Up to `max(num_workers, batch_size)` rows are read in advance.
        overwrite (`bool`, defaults to `False`):
            Whether clips of a dataset in `output_dir` may be dropped if `rows` has no good row for them.

    Returns:
        `DatasetSummary` on the main process, None on the others.

    Raises:
        ValueError: If no row could be encoded, or if clips would be dropped and `overwrite` is not set. Encoded rows are
            kept for the next run.
    """
    state = process_state()
    partial_dir = output_dir.with_name(output_dir.name + ".partial")
    if state.is_main_process:
        recover_folder(output_dir)
        partial_dir.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.tmp", "progress-*.jsonl"):
            for leftover in partial_dir.glob(pattern):
                leftover.unlink()
    state.wait_for_everyone()

    known = set(_open_sources(output_dir, partial_dir))
    if known:
        logger.info(f"Found {len(known)} encoded rows of earlier runs; rows that have not changed are reused.")
    share = _Share(rows, row_encoder, known, partial_dir, tensor_dtype, shard_size)
    progress = share.encode_all(range(state.process_index, len(rows), state.num_processes), batch_size, num_workers)
    lines = "".join(json.dumps(entry) + "\n" for entry in progress)
    write_text(partial_dir / f"progress-{state.process_index}.jsonl", lines)
    state.wait_for_everyone()
    summary = None
    if state.is_main_process:
        request = {"digest": digest, "settings": dict(settings or {})}
        summary = _assemble(rows, output_dir, partial_dir, request, tensor_dtype, overwrite)
    state.wait_for_everyone()
    return summary


class _Share:
    """The rows of one process: encodes those that are not stored yet, and writes them in shards."""

    def __init__(
        self,
        rows: Sequence[ManifestRow],
        row_encoder: RowEncoder,
        known: set[str],
        partial_dir: Path,
        tensor_dtype: str,
        shard_size: int,
    ) -> None:
        self.rows = rows
        self.row_encoder = row_encoder
        # Keys of the rows that are stored or encoded.
        self.known = known
        self.partial_dir = partial_dir
        self.tensor_dtype = tensor_dtype
        self.shard_size = shard_size
        self.shard: dict[str, dict[str, Any]] = {}
        self.remarks: dict[str, list[str]] = {}
        # Rows that wait to be encoded. Equal rows share a key.
        self.waiting: dict[str, list[ReadRow]] = {}
        self.progress: list[dict[str, Any]] = []

    def encode_all(self, positions: Sequence[int], batch_size: int, num_workers: int) -> list[dict[str, Any]]:
        """Encode the rows at these positions. Returns for each its key, or the reason why it has none."""
        reader = RowReader(self.row_encoder, self.rows, self.known)
        num_ahead = max(num_workers, batch_size)
        hide_bar = not process_state().is_main_process
        with closing(map_ahead(reader, positions, num_workers=num_workers, num_ahead=num_ahead)) as read_rows:
            try:
                for row in tqdm(read_rows, total=len(positions), desc="Encoding", unit="clip", disable=hide_bar):
                    self._add(row)
                    if len(self.waiting) == batch_size:
                        self._encode_waiting()
                self._encode_waiting()
            finally:
                # Also when interrupted: keep the rows that are encoded.
                self._write_shard()
        return self.progress

    def _add(self, row: ReadRow) -> None:
        if isinstance(row.key, VideoError):
            self._note(row, None, reason=str(row.key))
        elif row.key in self.known:
            self._note(row, row.key)
        else:
            self.waiting.setdefault(row.key, []).append(row)

    def _note(self, row: ReadRow, key: str | None, *, encoded: bool = False, reason: str | None = None) -> None:
        self.progress.append({"position": row.position, "key": key, "encoded": encoded, "reason": reason})

    def _encode_waiting(self) -> None:
        results = self._encode([first for first, *_ in self.waiting.values()])
        for (key, equal), result in zip(self.waiting.items(), results, strict=True):
            tried = 1
            # Equal rows may come from different files: if one is bad, another may be good.
            while isinstance(result, VideoError):
                self._note(equal[tried - 1], None, reason=str(result))
                if tried == len(equal):
                    break
                (result,) = self._encode([equal[tried]])
                tried += 1
            else:
                self.remarks[key] = result.pop("remarks", [])
                self.shard[key] = result
                self.known.add(key)
                for row in equal[tried - 1 :]:
                    self._note(row, key, encoded=row is equal[tried - 1])
        self.waiting.clear()
        if len(self.shard) >= self.shard_size:
            self._write_shard()

    def _encode(self, group: Sequence[ReadRow]) -> list[dict[str, Any] | VideoError]:
        contents = {row.position: row.take_content() for row in group}
        good = {position: content for position, content in contents.items() if not isinstance(content, VideoError)}
        results = self.row_encoder.encode_rows([self.rows[position] for position in good], list(good.values()))
        encoded = dict(zip(good, results, strict=True))
        return [encoded.get(position, content) for position, content in contents.items()]

    def _write_shard(self) -> None:
        if self.shard:
            _write_shard(self.partial_dir, self.shard, self.remarks, self.tensor_dtype)
            self.shard.clear()
            self.remarks.clear()


def _write_shard(
    partial_dir: Path,
    shard: Mapping[str, Mapping[str, Any]],
    remarks: Mapping[str, Sequence[str]],
    tensor_dtype: str,
) -> None:
    table = rows_to_table(list(shard.values()), tensor_dtype)
    table = table.replace_schema_metadata({"keys": json.dumps(list(shard)), "remarks": json.dumps(remarks)})
    path = partial_dir / f"shard-{hash_text(json.dumps(list(shard)))[:16]}.arrow"
    # Processes with equal rows may write the same shard at the same time.
    with replacing(path, tag=f".{os.getpid()}") as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


@dataclass(frozen=True)
class _Stored:
    """An encoded row: its index in a memory-mapped table, and its remarks."""

    table: pa.Table
    index: int
    remarks: Sequence[str]


def _open_sources(output_dir: Path, partial_dir: Path) -> dict[str, _Stored]:
    """Stored rows by key, of the finished dataset and of the shards."""
    sources: dict[str, _Stored] = {}

    def add(table: pa.Table, keys: Sequence[str], remarks: Mapping[str, Sequence[str]]) -> None:
        sources.update({key: _Stored(table, index, remarks.get(key, [])) for index, key in enumerate(keys)})

    if (output_dir / STATE_FILE).is_file():
        state = json.loads((output_dir / STATE_FILE).read_text(encoding="utf-8"))
        table = Dataset.load_from_disk(str(output_dir)).data.table
        if table.num_rows != len(state["keys"]):
            raise ValueError(f"'{output_dir}' was changed after `preprocess` wrote it; choose another `output_dir`.")
        add(table, state["keys"], state.get("remarks", {}))
    for path in sorted(partial_dir.glob("shard-*.arrow")):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        metadata = table.schema.metadata
        add(table, json.loads(metadata[b"keys"]), json.loads(metadata.get(b"remarks", b"{}")))
    return sources


def _assemble(
    rows: Sequence[ManifestRow],
    output_dir: Path,
    partial_dir: Path,
    request: Mapping[str, Any],
    tensor_dtype: str,
    overwrite: bool,
) -> DatasetSummary:
    """Put the stored rows in the manifest's order, add ids and labels, and replace the old folder."""
    progress: list[dict[str, Any]] = []
    for path in partial_dir.glob("progress-*.jsonl"):
        progress += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    progress.sort(key=lambda entry: entry["position"])
    report = [_report_line(rows[entry["position"]], entry["reason"]) for entry in progress if entry["key"] is None]
    good = [entry for entry in progress if entry["key"] is not None]
    good_rows = [rows[entry["position"]] for entry in good]
    if not good:
        write_text(partial_dir / REPORT_FILE, "".join(report))
        raise ValueError(
            f"none of the {len(rows)} clips could be used; the reasons are in {partial_dir / REPORT_FILE}"
        )

    dropped = dropped_clips(output_dir, rows, progress)
    if not overwrite:
        check_dropped(output_dir, dropped)
    sources = _open_sources(output_dir, partial_dir)
    stored = [sources[entry["key"]] for entry in good]
    tables = [row.table.slice(row.index, 1) for row in stored]
    table = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    ids = {row.id for row in good_rows}
    unpaired = [row for row in good_rows if row.rejected_id is not None and row.rejected_id not in ids]
    report += [
        _report_line(row, f"kept, but unpaired: its rejected clip {row.rejected_id!r} is bad") for row in unpaired
    ]
    report += [
        _report_line(row, f"kept, but {remark}")
        for row, encoded in zip(good_rows, stored, strict=True)
        for remark in encoded.remarks
    ]
    columns: dict[str, list[Any]] = {
        "id": [row.id for row in good_rows],
        "pair_id": [row.pair_id for row in good_rows],
        "rejected_id": [row.rejected_id if row.rejected_id in ids else None for row in good_rows],
        "source": [str(row.files[0]) if row.files else None for row in good_rows],
        **{name: [row.labels.get(name) for row in good_rows] for name in LABELS},
    }
    keys = [entry["key"] for entry in good]
    remarks = {key: list(row.remarks) for key, row in zip(keys, stored, strict=True) if row.remarks}
    save_table(
        replace_columns(table, columns),
        latent_features(tensor_dtype),
        output_dir,
        {STATE_FILE: json.dumps({**request, "keys": keys, "remarks": remarks}), REPORT_FILE: "".join(report)},
    )
    shutil.rmtree(partial_dir)
    num_bad = len(progress) - len(good)
    num_encoded = sum(entry["encoded"] for entry in good)
    return DatasetSummary(num_rows=len(good), num_encoded=num_encoded, num_bad=num_bad, num_dropped=len(dropped))


def _report_line(row: ManifestRow, reason: str) -> str:
    path = str(row.files[0]) if row.files else None
    return json.dumps({"id": row.id, "path": path, "reason": reason}) + "\n"


def replace_columns(table: pa.Table, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Table of a latent dataset with new values for some of its columns, which must not be tensors."""
    schema = latent_features().arrow_schema
    for name, values in columns.items():
        field = schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))
    return table


def save_table(table: pa.Table, features: Features, output_dir: Path, files: Mapping[str, str]) -> None:
    """
    Write a folder for `datasets.load_from_disk` atomically, with text files beside the data.

    The table may be memory-mapped from the same folder.
    """
    temporary = temporary_folder(output_dir)
    Dataset(table, info=DatasetInfo(features=features)).save_to_disk(str(temporary))
    for name, text in files.items():
        (temporary / name).write_text(text, encoding="utf-8")
    replace_folder(temporary, output_dir)
