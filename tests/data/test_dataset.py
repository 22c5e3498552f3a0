import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from hy_prfl.data.collators import collate_latents
from hy_prfl.data.dataset import (
    SHARED_MEMORY,
    RowDataset,
    check_shared_memory,
    latent_shapes,
    load_latent_dataset,
    preference_pairs,
    require_latents,
    rows_digest,
    rows_with_label,
    single_value,
    stream_batches,
)
from hy_prfl.data.sampler import BucketBatchSampler


Write = Callable[..., Path]


def test_rows_without_a_label_are_left_out_not_poor(tmp_path: Path, write_latents: Write) -> None:
    overrides = {0: {"physics_quality": None}, 1: {"human_quality": None}, 3: {"human_quality": 0}}
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6, overrides=overrides)))
    assert rows_with_label(dataset, "motion_quality", "d") == ([2, 3, 4, 5], [0, 0, 0, 1])
    assert rows_with_label(dataset, "physics_quality", "d") == ([1, 2, 3, 4, 5], [1, 0, 1, 0, 1])
    with pytest.raises(ValueError, match="no row has a label for the task 'text_alignment'"):
        rows_with_label(dataset, "text_alignment", "d")


def test_digest_of_the_rows(tmp_path: Path, write_latents: Write) -> None:
    def digest(name: str, **options: object) -> str:
        return rows_digest(load_latent_dataset(str(write_latents(tmp_path / name, 4, **options))))

    same = digest("one")
    assert digest("two") == same
    others = [
        {"physics_quality": 1},
        {"prompt": "x"},
        {"source_hash": "x"},
        {"id": "x"},
        {"latents_shape": [16, 1, 1, 1]},
    ]
    digests = {digest(f"other-{index}", overrides={0: other}) for index, other in enumerate(others)}
    assert len(digests | {same}) == 6


def test_pairs_of_one_prompt(tmp_path: Path, write_latents: Write) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6)))  # rows 2k and 2k+1 share a prompt
    assert preference_pairs(dataset, "motion_quality", "d") == [(1, 0), (3, 2), (5, 4)]


def test_pair_ids_come_before_prompts_and_named_rows_before_both(tmp_path: Path, write_latents: Write) -> None:
    overrides: dict[int, dict[str, object]] = {
        0: {"pair_id": "p"}, 3: {"pair_id": "p"}, 5: {"pair_id": "p"},
        1: {"rejected_id": "clip-7"},
    }  # fmt: skip
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 8, overrides=overrides)))
    # Row 1 beats row 7 because it says so; 3 and 5 beat 0 in pair p; 2, 4 and 6 have no good partner left.
    assert preference_pairs(dataset, "motion_quality", "d") == [(1, 7), (3, 0), (5, 0)]


def test_unpaired_clips_only_when_asked_for(
    tmp_path: Path, write_latents: Write, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = {index: {"prompt": f"own {index}"} for index in range(6)}
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6, overrides=overrides)))
    with pytest.raises(ValueError, match="allow_unpaired"):
        preference_pairs(dataset, "motion_quality", "d")
    pairs = preference_pairs(dataset, "motion_quality", "d", allow_unpaired=True)
    assert [good for good, _ in pairs] == [1, 3, 5]
    assert all(poor in (0, 2, 4) for _, poor in pairs)
    assert "random poor ones" in caplog.text


def test_pairs_of_different_shape_and_unknown_partners(tmp_path: Path, write_latents: Write) -> None:
    different = load_latent_dataset(str(write_latents(tmp_path / "d", 4, shapes=((2, 4, 4), (2, 4, 6)))))
    with pytest.raises(ValueError, match="no good and poor clip"):
        preference_pairs(different, "motion_quality", "d")
    lost = load_latent_dataset(str(write_latents(tmp_path / "e", 4, overrides={1: {"rejected_id": "gone"}})))
    with pytest.raises(ValueError, match="row 'clip-1' names 'gone'"):
        preference_pairs(lost, "motion_quality", "e")


def test_a_stream_holds_the_stored_numbers(tmp_path: Path, write_latents: Write) -> None:
    path = write_latents(tmp_path / "d", 5, shapes=((2, 4, 4), (2, 4, 6)))
    dataset = load_latent_dataset(str(path))
    stored = load_from_disk(path)
    sampler = BucketBatchSampler(latent_shapes(dataset), batch_size=2, seed=0)
    for batch in islice(stream_batches(RowDataset(dataset, range(5)), collate_latents, sampler), 6):
        assert batch.latents is not None
        for row_id, latents in zip(batch.ids, batch.latents, strict=True):
            row = stored[int(row_id.removeprefix("clip-"))]
            np.testing.assert_array_equal(latents.flatten(), np.float32(row["latents"]))
            assert list(latents.shape) == row["latents_shape"]


def test_reading_with_workers_gives_the_same_batches(tmp_path: Path, write_latents: Write) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6)))
    sampler = BucketBatchSampler(latent_shapes(dataset), batch_size=2, seed=0)
    plain, parallel = (
        [batch.ids for batch in islice(stream_batches(RowDataset(dataset, range(6)), collate_latents, sampler, num_workers=n), 5)]
        for n in (0, 2)
    )  # fmt: skip
    assert plain == parallel


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_workers_need_room_in_shared_memory(
    tmp_path: Path, write_latents: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6, shapes=((2, 4, 4), (2, 4, 6)))))
    rows = RowDataset(dataset, range(6))
    sampler = BucketBatchSampler(latent_shapes(dataset), batch_size=2, seed=0)
    free = shutil.disk_usage(SHARED_MEMORY).free
    # Latents of the larger shape and three prompts as long as the longest, which has 5 tokens and is not of that shape, in
    # half precision; two batches for each worker.
    batch = 2 * 2 * (16 * 2 * 4 * 6 + 3 * 5 * 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_shared_memory(rows, collate_latents, sampler, num_workers=0)
    check_shared_memory(rows, collate_latents, sampler, num_workers=1)
    too_many = free // (batch * 2 * 8) + 100
    with pytest.raises(ValueError, match=rf"`dataloader_num_workers` {too_many}: with 8 processes .*--shm-size"):
        check_shared_memory(rows, collate_latents, sampler, num_workers=too_many)
    check_shared_memory(rows, collate_latents, sampler, num_workers=too_many - 1000)


def test_what_is_no_latent_dataset_is_refused(tmp_path: Path, write_latents: Write) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_latent_dataset(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        load_latent_dataset(str(tmp_path / "empty"))
    # Folders of runs: `datasets` finds no data files, or JSON files that are no table of one kind.
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"run: the folder is not a latent dataset: ") as no_files:
        load_latent_dataset(str(run))
    for name, content in (("one", '{"a": 1}'), ("two", '{"b": [1]}')):
        (run / f"{name}.json").write_text(content)
    with pytest.raises(ValueError, match=r"run: the folder is not a latent dataset: ") as no_table:
        load_latent_dataset(str(run))
    for error in (no_files.value, no_table.value):
        assert error.__cause__ is not None
        assert "\n" not in str(error)
    Dataset.from_dict({"id": ["a"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match=r"not a latent dataset.*latents"):
        load_latent_dataset(str(tmp_path / "other"))
    rows = load_from_disk(write_latents(tmp_path / "d", 2))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="expected one split, found train, test"):
        load_latent_dataset(str(tmp_path / "splits"))


def test_one_value_for_all_rows(tmp_path: Path, write_latents: Write) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 3, overrides={1: {"vae_fingerprint": "other"}})))
    assert single_value(dataset, "max_sequence_length", "d") == 16
    with pytest.raises(ValueError, match=r"d: all rows must have the same `vae_fingerprint`.*other"):
        single_value(dataset, "vae_fingerprint", "d")
    require_latents(dataset, "d")
    with pytest.raises(ValueError, match="2 of 2 rows have no latents"):
        require_latents(load_latent_dataset(str(write_latents(tmp_path / "p", 2, prompts_only=True))), "p")
