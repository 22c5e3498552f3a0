"""
Compares the cost of reading a clip: upstream's float32 .npy files, and rows of a latent dataset.

    python -m examples.benchmark.reading                          # 81 frames at 480P, as batches of one clip
    python -m examples.benchmark.reading --height 720 --width 1280 --batch_size 2

Writes random clips in both layouts to a temporary folder and reads them alternately. Prints the CPU time of a clip and
the ratio: the median if this process reads, and the mean if a worker process reads and this process receives. Compare
only ratios of one run. Files come from the page cache, so this is the cost of copies and parsing. From a disk, half
precision would have half of the bytes to read.

- Upstream: the meta file and five `np.load`, as in its dataset for every task (latents, condition, image embeddings, prompt,
  negative prompt), then torch's default collate function.
- hy_prfl: rows of the dataset, then `collate_latents`. Its batch has caption, long caption and empty prompt, each padded to 512
  tokens.
"""

import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, default_collate

from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.collators import collate_latents
from hy_prfl.data.dataset import RowDataset, load_latent_dataset
from hy_prfl.data.schema import pack_tensor, rows_to_table


# Reads the batch with an index.
Reader = Callable[[int], object]

TEXT_DIM, IMAGE_DIM, IMAGE_TOKENS = 4096, 1280, 257
# Tokens of a short and a long caption and the negative prompt in upstream's sample data, and of the empty prompt.
SHORT, LONG, NEGATIVE, EMPTY = 20, 60, 131, 1
UPSTREAM = "upstream, five .npy files"
# Maps the content of upstream's files to fields of its meta file.
FIELDS = {
    "latents": "vae_latent_path",
    "condition": "f1_black_path",
    "image_embeds": "imgclip_path",
    "prompt_embeds": "textshort_path",
    "long_prompt_embeds": "textlong_path",
}


@dataclass(kw_only=True)
class ReadingConfig:
    """Options of the measurement."""

    height: int = field(default=480, metadata={"help": "Height of the clips, a multiple of 16."})
    width: int = field(default=832, metadata={"help": "Width of the clips, a multiple of 16."})
    num_frames: int = field(default=81, metadata={"help": "Frames of the clips, 4k + 1."})
    batch_size: int = field(default=1, metadata={"help": "Clips per batch."})
    num_clips: int = field(default=4, metadata={"help": "Clips to write."})
    repetitions: int = field(default=40, metadata={"help": "Timed batches of each layout."})

    def __post_init__(self) -> None:
        for name, multiple, rest in (("height", 16, 0), ("width", 16, 0), ("num_frames", 4, 1)):
            value = getattr(self, name)
            check(
                value >= 1 and value % multiple == rest, name, value, f"a positive multiple of {multiple} plus {rest}"
            )
        for name in ("batch_size", "num_clips", "repetitions"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ReadingConfig, argv, description="What reading a clip costs.")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder, config)
        readers = {
            UPSTREAM: upstream_reader(folder, config),
            "text-to-video row": dataset_reader(folder / "text", config),
            "image-to-video row": dataset_reader(folder / "image", config),
        }
        columns = [here(readers, config.repetitions), through_worker(readers, config.repetitions)]
    print(
        f"{config.num_frames} frames of {config.width}x{config.height}, batches of {config.batch_size}; CPU time of a clip:"
    )
    print(f"{'':26}  read here (of upstream)   through a worker (of upstream)")
    for name in readers:
        cells = [
            f"{1000 * seconds[name] / config.batch_size:7.2f} ms ({seconds[name] / seconds[UPSTREAM]:.2f})"
            for seconds in columns
        ]
        print(f"{name:26}" + "".join(f"{cell:>22}" for cell in cells))


def write_clips(folder: Path, config: ReadingConfig) -> None:
    """
    Write the same random clips as upstream's files (`folder/upstream`) and as the datasets `folder/text` and `folder/image`.

    All values can be represented in half precision, so that both layouts can be compared exactly.
    """
    rng = np.random.default_rng(0)
    size = ((config.num_frames - 1) // 4 + 1, config.height // 8, config.width // 8)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)

    (folder / "upstream").mkdir()
    np.save(folder / "upstream" / "negative.npy", draw(1, NEGATIVE, TEXT_DIM).astype(np.float32))
    empty = draw(EMPTY, TEXT_DIM)
    rows: dict[str, list[dict[str, object]]] = {"text": [], "image": []}
    for index in range(config.num_clips):
        arrays = {
            "latents": draw(16, *size),
            "condition": draw(20, *size),
            "image_embeds": draw(IMAGE_TOKENS, IMAGE_DIM),
            "prompt_embeds": draw(SHORT, TEXT_DIM),
            "long_prompt_embeds": draw(LONG, TEXT_DIM),
        }
        meta = {"source_id": f"clip-{index}", "latent_shape": [1, 16, *size]}
        for name, array in arrays.items():
            meta[FIELDS[name]] = str(folder / "upstream" / f"{index}_{name}.npy")
            # In upstream's files the condition has no mask channels; its trainer adds them.
            stored = array[4:] if name == "condition" else array
            np.save(str(meta[FIELDS[name]]), stored[None].astype(np.float32))
        (folder / "upstream" / f"{index}_meta_v1.json").write_text(json.dumps(meta))
        row: dict[str, object] = {"id": f"clip-{index}", "prompt": "a clip", "max_sequence_length": 512}
        for kind in rows:
            columns = dict(row)
            for name, array in (arrays | {"null_prompt_embeds": empty}).items():
                kept = None if kind == "text" and name in ("condition", "image_embeds") else array
                columns |= pack_tensor(name, kept, "float16", source=f"clip-{index}")
            rows[kind].append(columns)
    for kind, packed in rows.items():
        Dataset(rows_to_table(packed)).save_to_disk(folder / kind)


def upstream_reader(folder: Path, config: ReadingConfig) -> Reader:
    """Function that reads the batch with an index as upstream's dataset and data loader do."""

    def read(batch: int) -> object:
        clips = []
        for position in range(batch * config.batch_size, (batch + 1) * config.batch_size):
            path = folder / "upstream" / f"{position % config.num_clips}_meta_v1.json"
            meta = json.loads(path.read_text())
            paths = [meta[FIELDS[name]] for name in ("latents", "condition", "image_embeds", "prompt_embeds")]
            paths.append(folder / "upstream" / "negative.npy")
            clips.append([torch.from_numpy(np.load(path)[0]) for path in paths])
        return default_collate(clips)

    return read


def dataset_reader(folder: Path, config: ReadingConfig) -> Reader:
    """Function that reads the batch with an index from a latent dataset as the trainers' data loader does."""
    rows = RowDataset(load_latent_dataset(str(folder)), range(config.num_clips))

    def read(batch: int) -> object:
        positions = range(batch * config.batch_size, (batch + 1) * config.batch_size)
        return collate_latents([rows[position % config.num_clips] for position in positions])

    return read


def here(readers: dict[str, Reader], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of a batch for each reader. They read alternately, so that load affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    gc.disable()
    for batch in range(-3, repetitions):
        for name, read in readers.items():
            started = time.process_time()
            read(max(batch, 0))
            if batch >= 0:
                times[name].append(time.process_time() - started)
    gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


class Batches(torch.utils.data.Dataset[object]):
    """The batches of a reader as a dataset."""

    def __init__(self, read: Reader, num_batches: int) -> None:
        self.read = read
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> object:
        return self.read(index)


def through_worker(readers: dict[str, Reader], repetitions: int) -> dict[str, float]:
    """Mean CPU seconds of a batch in worker and receiver, minus those of a worker that sends nothing."""
    idle = _worker_seconds(lambda batch: None, repetitions)
    return {name: (_worker_seconds(read, repetitions) - idle) / repetitions for name, read in readers.items()}


def _worker_seconds(read: Reader, repetitions: int) -> float:
    started = _all_cpu_seconds()
    for _ in DataLoader(Batches(read, repetitions), batch_size=None, num_workers=1, collate_fn=_unchanged):
        pass
    return _all_cpu_seconds() - started


def _unchanged(batch: object) -> object:
    return batch


def _all_cpu_seconds() -> float:
    """CPU seconds of this process and its finished child processes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
