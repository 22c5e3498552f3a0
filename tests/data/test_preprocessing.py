"""Clips become rows: values against the encoder itself, bad clips one by one, resuming, prompt-only datasets."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image

from hy_prfl.data import hashes as hashes_of_files
from hy_prfl.data import shared_hashing
from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.data.finished import is_complete, request_digest
from hy_prfl.data.hashes import hash_file
from hy_prfl.data.manifest import ManifestRow
from hy_prfl.data.preprocessing import ClipContent, ClipEncoder, ClipSettings
from hy_prfl.data.schema import TENSORS, table_to_rows, unpack_tensor
from hy_prfl.data.shared_hashing import hash_files
from hy_prfl.data.store import DatasetSummary, build_dataset
from hy_prfl.data.video import VideoError, read_video, resize_and_crop, to_float


SETTINGS: dict[str, Any] = {"num_frames": 9, "min_num_frames": 9, "buckets": ((32, 48), (48, 32))}


@pytest.fixture(scope="module")
def encoder(pipeline_dir: Path) -> LatentEncoder:
    return LatentEncoder.from_pretrained(str(pipeline_dir))


@pytest.fixture(scope="module")
def i2v_encoder(i2v_pipeline_dir: Path) -> LatentEncoder:
    return LatentEncoder.from_pretrained(str(i2v_pipeline_dir))


@pytest.fixture(scope="module")
def clips(write_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{index}.mp4", num_frames=11, seed=index) for index in range(5)]


def make_row(name: str, **fields: Any) -> ManifestRow:
    return ManifestRow(where=f"row {name}", id=name, **({"prompt": "a red circle"} | fields))


def build(
    rows: list[ManifestRow],
    row_encoder: ClipEncoder,
    output_dir: Path,
    batch_size: int = 1,
    overwrite: bool = False,
    num_workers: int = 0,
) -> DatasetSummary:
    dtype = row_encoder.settings.tensor_dtype
    digest = request_digest(rows, {"settings": repr(row_encoder.settings)})
    summary = build_dataset(
        rows,
        row_encoder,
        output_dir,
        digest=digest,
        tensor_dtype=dtype,
        shard_size=2,
        batch_size=batch_size,
        num_workers=num_workers,
        overwrite=overwrite,
    )
    assert summary is not None
    return summary


def read_rows(output_dir: Path) -> list[dict[str, Any]]:
    return table_to_rows(load_from_disk(output_dir).data.table)


def assert_same_rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for first_row, second_row in zip(first, second, strict=True):
        for name in TENSORS:
            for value, other in zip(unpack_pair(first_row, name), unpack_pair(second_row, name), strict=True):
                np.testing.assert_array_equal(value, other)
        rest = set(first_row) - set(TENSORS)
        assert {name: first_row[name] for name in rest} == {name: second_row[name] for name in rest}


def unpack_pair(row: dict[str, Any], name: str) -> list[Any]:
    array = unpack_tensor(row, name)
    return [None, None] if array is None else [array.dtype, array]


def test_row_of_a_clip(encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    labels = {"physics_quality": 1, "human_quality": None}
    row = make_row("x", video=clips[0], long_prompt="a red circle moves", pair_id="p", labels=labels)
    build([row], ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")

    (stored,) = read_rows(tmp_path / "out")
    frames = to_float(resize_and_crop(read_video(clips[0], 16, 9), 32, 48))
    expected = {
        "latents": encoder.encode_video(frames),
        "prompt_embeds": encoder.encode_prompt("a red circle"),
        "long_prompt_embeds": encoder.encode_prompt("a red circle moves"),
        "null_prompt_embeds": encoder.encode_prompt(""),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(unpack_tensor(stored, name), value.to(torch.float16).numpy())
    assert stored["image_embeds"] is None
    assert stored["condition"] is None
    assert (stored["id"], stored["prompt"], stored["long_prompt"]) == ("x", "a red circle", "a red circle moves")
    assert (stored["num_frames"], stored["height"], stored["width"], stored["fps"]) == (9, 32, 48, 16.0)
    assert (stored["physics_quality"], stored["human_quality"], stored["blur_quality"]) == (1, None, None)
    assert (stored["pair_id"], stored["rejected_id"], stored["source"]) == ("p", None, str(clips[0]))
    assert stored["vae_fingerprint"] == encoder.vae_fingerprint
    assert stored["text_encoder_fingerprint"] == encoder.text_encoder_fingerprint
    assert stored["max_sequence_length"] == 512


def test_row_of_an_image_to_video_clip(i2v_encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    settings = ClipSettings(**SETTINGS, tensor_dtype="float32")
    build([make_row("x", video=clips[0])], ClipEncoder(i2v_encoder, settings), tmp_path / "out")
    (stored,) = read_rows(tmp_path / "out")
    frames = to_float(read_video(clips[0], 16, 9))
    image_embeds, condition = i2v_encoder.encode_condition(frames)
    assert image_embeds is not None
    for name, value in {"image_embeds": image_embeds, "condition": condition}.items():
        unpacked = unpack_tensor(stored, name)
        assert unpacked is not None
        assert unpacked.dtype == np.float32
        np.testing.assert_array_equal(unpacked, value.numpy())


def test_bucket_and_length_follow_the_clip(
    encoder: LatentEncoder, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    upright = write_video(tmp_path / "upright.mp4", num_frames=7, height=96, width=64)
    settings = ClipSettings(**(SETTINGS | {"min_num_frames": 5}))
    build([make_row("x", video=upright)], ClipEncoder(encoder, settings), tmp_path / "out")
    (stored,) = read_rows(tmp_path / "out")
    assert stored["latents_shape"] == [16, 2, 6, 4]
    assert (stored["num_frames"], stored["height"], stored["width"]) == (5, 48, 32)


def test_short_side_rule(encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    settings = ClipSettings(num_frames=5, min_num_frames=5, resolution=32)
    build([make_row("x", video=clips[0])], ClipEncoder(encoder, settings), tmp_path / "out")
    (stored,) = read_rows(tmp_path / "out")
    assert (stored["height"], stored["width"]) == (32, 64)


def test_bad_clips_are_reported_and_the_rest_goes_on(
    encoder: LatentEncoder, clips: list[Path], write_video: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    rows = [
        make_row("missing", video=tmp_path / "nowhere.mp4"),
        make_row("good", video=clips[0], rejected_id="junk"),
        make_row("junk", video=tmp_path / "junk.mp4"),
        make_row("short", video=write_video(tmp_path / "short.mp4", num_frames=5)),
        make_row("silent", video=clips[1], prompt=""),
        make_row("other", video=clips[2], rejected_id="good"),
    ]
    summary = build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")
    assert summary == DatasetSummary(num_rows=2, num_encoded=2, num_bad=4)
    stored = read_rows(tmp_path / "out")
    assert [(row["id"], row["rejected_id"]) for row in stored] == [("good", None), ("other", "good")]
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in report}
    assert "there is no file" in reasons["missing"]
    assert "cannot be decoded" in reasons["junk"]
    assert "too short: 5 frames" in reasons["short"]
    assert reasons["silent"] == "no caption"
    assert reasons["good"] == "kept, but unpaired: its rejected clip 'junk' is bad"
    assert report[0]["path"] == str(tmp_path / "nowhere.mp4")
    assert len(report) == 5


def test_values_that_do_not_fit_are_reported(i2v_pipeline_dir: Path, clips: list[Path]) -> None:
    encoder = LatentEncoder.from_pretrained(str(i2v_pipeline_dir))
    encoder.pipeline.vae.register_to_config(latents_std=[1e-9] * 16)
    row = make_row("x", video=clips[0])
    with pytest.raises(VideoError, match="clip 'x': `latents` reaches .* overflows float16"):
        ClipEncoder(encoder, ClipSettings(**SETTINGS)).encode_row(row)
    encoder.pipeline.vae.register_to_config(latents_std=[float("nan")] * 16)
    with pytest.raises(VideoError, match="clip 'x': `latents` holds a NaN"):
        ClipEncoder(encoder, ClipSettings(**SETTINGS)).encode_row(row)


def test_nothing_but_bad_clips_is_an_error(encoder: LatentEncoder, tmp_path: Path) -> None:
    rows = [make_row("a", video=tmp_path / "nowhere.mp4")]
    with pytest.raises(ValueError, match="none of the 1 clips could be used; the reasons are in"):
        build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")
    assert "there is no file" in (tmp_path / "out.partial" / "report.jsonl").read_text()
    assert not (tmp_path / "out").exists()


def test_batches_are_the_rows_one_by_one(
    encoder: LatentEncoder, clips: list[Path], write_video: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    videos = [clips[0], tmp_path / "junk.mp4", clips[1], clips[0], clips[2], clips[3]]
    videos.insert(3, write_video(tmp_path / "upright.mp4", num_frames=9, height=96, width=64))
    # The first and the fifth clip are equal.
    rows = [make_row(f"{index}", video=path) for index, path in enumerate(videos)]
    settings = ClipSettings(**SETTINGS, tensor_dtype="float32")
    expected = DatasetSummary(num_rows=6, num_encoded=5, num_bad=1)
    for batch_size in (1, 4):
        output_dir = tmp_path / f"batch-{batch_size}"
        assert build(rows, ClipEncoder(encoder, settings), output_dir, batch_size=batch_size) == expected
        report = json.loads((output_dir / "report.jsonl").read_text())
        assert (report["id"], report["path"]) == ("1", str(tmp_path / "junk.mp4"))
    singly, batched = (read_rows(tmp_path / f"batch-{batch_size}") for batch_size in (1, 4))
    assert [row["id"] for row in batched] == ["0", "2", "3", "4", "5", "6"]
    for first, second in zip(singly, batched, strict=True):
        assert first["latents_shape"] == second["latents_shape"]
        latents = [unpack_tensor(row, "latents") for row in (first, second)]
        # Another batch size is another order of summation.
        np.testing.assert_allclose(latents[1], latents[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_read_ahead_are_those_read_in_turn(
    encoder: LatentEncoder,
    clips: list[Path],
    write_video: Callable[..., Path],
    tmp_path: Path,
    batch_size: int,
) -> None:
    """The same rows in the same order, bit for bit, and the same report: bad, missing and equal clips among them."""
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    upright = write_video(tmp_path / "upright.mp4", num_frames=9, height=96, width=64)
    junk, missing = tmp_path / "junk.mp4", tmp_path / "nowhere.mp4"
    videos = [junk, clips[0], upright, missing, clips[1], clips[0], clips[2], clips[2], junk, clips[3], clips[4]]
    rows = [make_row(f"{index}", video=path) for index, path in enumerate(videos)]
    rows[9] = make_row("9", video=clips[3], prompt="")
    settings = ClipSettings(**SETTINGS, tensor_dtype="float32")
    in_turn, ahead = (
        build(rows, ClipEncoder(encoder, settings), tmp_path / str(num), batch_size=batch_size, num_workers=num)
        for num in (0, 3)
    )
    assert in_turn == ahead == DatasetSummary(num_rows=7, num_encoded=5, num_bad=4)
    assert_same_rows(read_rows(tmp_path / "0"), read_rows(tmp_path / "3"))
    assert (tmp_path / "0" / "report.jsonl").read_text() == (tmp_path / "3" / "report.jsonl").read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_run_continues_where_it_was(
    encoder: LatentEncoder, clips: list[Path], tmp_path: Path, num_workers: int
) -> None:
    rows = [make_row(path.stem, video=path) for path in clips]

    class InterruptedEncoder(ClipEncoder):
        def encode_rows(
            self, rows: Sequence[ManifestRow], contents: Sequence[ClipContent]
        ) -> list[dict[str, Any] | VideoError]:
            if rows[0].id == "3":
                raise KeyboardInterrupt
            return super().encode_rows(rows, contents)

    settings = ClipSettings(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        build(rows, InterruptedEncoder(encoder, settings), tmp_path / "out", num_workers=num_workers)
    assert not (tmp_path / "out").exists()
    # Leftovers of a process that was killed while it wrote.
    (tmp_path / "out.partial" / "shard-0.arrow.1.tmp").write_bytes(b"half a shard")
    (tmp_path / ".out.tmp").mkdir()

    summary = build(rows, ClipEncoder(encoder, settings), tmp_path / "out", num_workers=num_workers)
    assert summary == DatasetSummary(num_rows=5, num_encoded=2, num_bad=0)
    build(rows, ClipEncoder(encoder, settings), tmp_path / "whole")
    assert_same_rows(read_rows(tmp_path / "out"), read_rows(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_only_rows_that_changed_are_encoded_again(encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    settings = ClipSettings(**SETTINGS)
    rows = [make_row(path.stem, video=path) for path in clips[:4]]
    build(rows, ClipEncoder(encoder, settings), tmp_path / "out")

    changed = [
        make_row("new", video=clips[4]),
        make_row("3", video=clips[3], labels={"blur_quality": 0}),
        make_row("2", video=clips[2], prompt="a blue square"),
        make_row("renamed", video=clips[0], rejected_id="3"),
    ]
    with pytest.raises(
        ValueError, match="1 of its encoded clips would be lost. The first one is '1': it is not in the list"
    ):
        build(changed, ClipEncoder(encoder, settings), tmp_path / "out")
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["0", "1", "2", "3"]
    # What the refused run encoded is kept.
    summary = build(changed, ClipEncoder(encoder, settings), tmp_path / "out", overwrite=True)
    assert summary == DatasetSummary(num_rows=4, num_encoded=0, num_bad=0, num_dropped=1)
    build(changed, ClipEncoder(encoder, settings), tmp_path / "fresh")
    stored = read_rows(tmp_path / "out")
    assert_same_rows(stored, read_rows(tmp_path / "fresh"))
    assert [row["id"] for row in stored] == ["new", "3", "2", "renamed"]
    assert [row["blur_quality"] for row in stored] == [None, 0, None, None]


@pytest.mark.parametrize(
    "change",
    [{"fps": 8.0, "num_frames": 5, "min_num_frames": 5}, {"buckets": ((48, 32),)}, {"tensor_dtype": "float32"}],
)
def test_other_settings_encode_everything_again(
    encoder: LatentEncoder, clips: list[Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    rows = [make_row(path.stem, video=path) for path in clips[:2]]
    build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")
    settings = ClipSettings(**(SETTINGS | change))
    assert build(rows, ClipEncoder(encoder, settings), tmp_path / "out").num_encoded == 2
    build(rows, ClipEncoder(encoder, settings), tmp_path / "fresh")
    assert_same_rows(read_rows(tmp_path / "out"), read_rows(tmp_path / "fresh"))


def test_another_vae_encodes_everything_again(pipeline_dir: Path, clips: list[Path], tmp_path: Path) -> None:
    rows = [make_row(path.stem, video=path) for path in clips[:2]]
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    first = ClipEncoder(encoder, ClipSettings(**SETTINGS))
    encoder.pipeline.vae.register_to_config(latents_mean=[0.5] * 16)
    second = ClipEncoder(LatentEncoder(encoder.pipeline), ClipSettings(**SETTINGS))
    assert first.row_key(rows[0]) != second.row_key(rows[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_same_clip_twice_is_encoded_once(
    encoder: LatentEncoder, clips: list[Path], tmp_path: Path, batch_size: int
) -> None:
    rows = [make_row("a", video=clips[0]), make_row("b", video=clips[0]), make_row("c", video=clips[1])]
    summary = build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out", batch_size=batch_size)
    assert summary == DatasetSummary(num_rows=3, num_encoded=2, num_bad=0)
    stored = read_rows(tmp_path / "out")
    assert [row["id"] for row in stored] == ["a", "b", "c"]
    np.testing.assert_array_equal(stored[0]["latents"], stored[1]["latents"])


def test_finished_dataset_is_recognised(encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    rows = [make_row("a", video=clips[0])]
    digest = request_digest(rows, {"settings": repr(ClipSettings(**SETTINGS))})
    assert not is_complete(tmp_path / "out", digest, {}, rows)
    build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")
    assert is_complete(tmp_path / "out", digest, {}, rows)
    assert not is_complete(tmp_path / "out", "another", {}, rows)


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no dataset of `preprocess`"):
        is_complete(tmp_path, "digest", {}, [])
    (tmp_path / "empty").mkdir()
    assert not is_complete(tmp_path / "empty", "digest", {}, [])


def test_swap_that_was_cut_off_is_undone(encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    rows = [make_row("a", video=clips[0])]
    row_encoder = ClipEncoder(encoder, ClipSettings(**SETTINGS))
    build(rows, row_encoder, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert build(rows, row_encoder, tmp_path / "out").num_encoded == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_digest_follows_rows_settings_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    rows = [make_row("a", video=path)]
    digests = [request_digest(rows, {"fps": 16})]
    path.write_bytes(b"x")
    digests.append(request_digest(rows, {"fps": 16}))
    assert request_digest(rows, {"fps": 16}) == digests[-1]
    path.write_bytes(b"xy")
    digests.append(request_digest(rows, {"fps": 16}))
    digests.append(request_digest(rows, {"fps": 8}))
    digests.append(request_digest([make_row("a", video=path, labels={"blur_quality": 1})], {"fps": 8}))
    digests.append(request_digest(rows, {"fps": 8}, [path]))
    assert len(set(digests)) == len(digests)


def test_prompts_of_a_text_to_video_pipeline(encoder: LatentEncoder, tmp_path: Path) -> None:
    settings = ClipSettings(num_frames=9, buckets=((32, 48),), prompts_only=True)
    rows = [make_row("a"), make_row("b", prompt="a blue square"), make_row("c", prompt="")]
    summary = build(rows, ClipEncoder(encoder, settings), tmp_path / "out")
    assert summary == DatasetSummary(num_rows=2, num_encoded=2, num_bad=1)
    for row in read_rows(tmp_path / "out"):
        assert row["latents"] is None
        assert row["latents_shape"] == [16, 3, 4, 6]
        assert (row["num_frames"], row["height"], row["width"]) == (9, 32, 48)
        assert (row["source"], row["source_hash"]) == (None, None)
        embeds = encoder.encode_prompt(row["prompt"]).to(torch.float16).numpy()
        np.testing.assert_array_equal(unpack_tensor(row, "prompt_embeds"), embeds)


def test_prompts_of_an_image_to_video_pipeline(i2v_encoder: LatentEncoder, clips: list[Path], tmp_path: Path) -> None:
    first = read_video(clips[0], 16, 1)
    Image.fromarray(first[0]).save(tmp_path / "first.png")
    settings = ClipSettings(num_frames=9, buckets=((32, 48),), prompts_only=True)
    rows = [make_row("image", image=tmp_path / "first.png"), make_row("video", video=clips[0]), make_row("none")]
    summary = build(rows, ClipEncoder(i2v_encoder, settings), tmp_path / "out")
    assert summary == DatasetSummary(num_rows=2, num_encoded=2, num_bad=1)
    assert "neither a first image nor a video" in (tmp_path / "out" / "report.jsonl").read_text()
    _, condition = i2v_encoder.encode_condition(to_float(read_video(clips[0], 16, 9)))
    for row in read_rows(tmp_path / "out"):
        assert row["latents"] is None
        assert row["latents_shape"] == [16, 3, 4, 6]
        np.testing.assert_array_equal(unpack_tensor(row, "condition"), condition.to(torch.float16).numpy())
        assert row["image_embeds_shape"] == [5, 32]


def test_first_and_last_frame(flf2v_pipeline_dir: Path, clips: list[Path], tmp_path: Path) -> None:
    encoder = LatentEncoder.from_pretrained(str(flf2v_pipeline_dir))
    video = read_video(clips[0], 16, 9)
    for name, image in (("first", video[0]), ("last", video[-1])):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    images = {"image": tmp_path / "first.png", "last_image": tmp_path / "last.png"}
    settings = {"num_frames": 9, "buckets": ((32, 48),)}
    clip_settings = ClipSettings(**settings, min_num_frames=9)
    build([make_row("clip", video=clips[0])], ClipEncoder(encoder, clip_settings), tmp_path / "clips")
    rows = [make_row("images", **images), make_row("video", video=clips[0]), make_row("one", image=images["image"])]
    prompt_encoder = ClipEncoder(encoder, ClipSettings(**settings, prompts_only=True))
    assert build(rows, prompt_encoder, tmp_path / "prompts") == DatasetSummary(num_rows=2, num_encoded=2, num_bad=1)
    assert "a first image, but no last image" in (tmp_path / "prompts" / "report.jsonl").read_text()
    image_embeds, condition = encoder.encode_condition(to_float(video))
    assert image_embeds is not None
    for row in [*read_rows(tmp_path / "clips"), *read_rows(tmp_path / "prompts")]:
        np.testing.assert_array_equal(unpack_tensor(row, "condition"), condition.to(torch.float16).numpy())
        np.testing.assert_array_equal(unpack_tensor(row, "image_embeds"), image_embeds.to(torch.float16).numpy())
        assert row["image_embeds_shape"] == [2, 5, 32]


@pytest.mark.parametrize("buckets", [(), ((32, 48), (48, 32))])
def test_prompts_of_a_text_to_video_pipeline_need_one_size(
    encoder: LatentEncoder, buckets: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(ValueError, match="`buckets` must have exactly one size"):
        ClipEncoder(encoder, ClipSettings(buckets=buckets, prompts_only=True))


def test_sizes_must_fit_the_vae(encoder: LatentEncoder) -> None:
    with pytest.raises(ValueError, match="40x48 must be multiples of 16"):
        ClipEncoder(encoder, ClipSettings(buckets=((40, 48),)))


def test_equal_clips_do_not_share_what_is_wrong_with_one_of_them(
    encoder: LatentEncoder, clips: list[Path], tmp_path: Path
) -> None:
    """A file may go between the moment it is hashed and the one it is read."""
    paths = [tmp_path / name for name in ("gone.mp4", "12:30:05.mp4", "c.mp4")]
    for path in paths:
        shutil.copy(clips[0], path)

    class SlowEncoder(ClipEncoder):
        def read_row(self, row: ManifestRow) -> ClipContent:
            paths[0].unlink(missing_ok=True)
            return super().read_row(row)

    rows = [make_row(path.stem, video=path) for path in paths]
    summary = build(rows, SlowEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out", batch_size=3)
    assert summary == DatasetSummary(num_rows=2, num_encoded=1, num_bad=1)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["12:30:05", "c"]
    report = json.loads((tmp_path / "out" / "report.jsonl").read_text())
    assert (report["id"], report["reason"]) == ("gone", f"there is no file '{paths[0]}'")


def test_clips_with_a_long_frame_are_reported(encoder: LatentEncoder, tmp_path: Path) -> None:
    """Also of rows that were encoded by a run before."""
    path = tmp_path / "paused.mp4"
    time_base = Fraction(1, 90000)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=16, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = time_base
        for index, time in enumerate([0, 0.0625, 1.5, 1.5625, 1.625, 1.6875]):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    rows = [make_row("paused", video=path)]
    settings = SETTINGS | {"num_frames": 25, "min_num_frames": 25}
    expected = {"id": "paused", "path": str(path), "reason": "kept, but one frame fills 1.44 s of the clip"}
    row_encoder = ClipEncoder(encoder, ClipSettings(**settings))
    for num_encoded in (1, 0):
        assert build(rows, row_encoder, tmp_path / "out").num_encoded == num_encoded
        assert json.loads((tmp_path / "out" / "report.jsonl").read_text()) == expected
    joined = ClipSettings(**settings | {"min_num_frames": 5, "max_frame_duration": 1.0, "clock_jumps": "join"})
    build(rows, ClipEncoder(encoder, joined), tmp_path / "joined")
    assert (
        "kept, but its clock was joined (jumps: 1), first where"
        in json.loads((tmp_path / "joined" / "report.jsonl").read_text())["reason"]
    )
    refused = ClipEncoder(encoder, ClipSettings(**settings | {"max_frame_duration": 1.0}))
    with pytest.raises(VideoError, match="longer than `max_frame_duration`"):
        refused.encode_row(rows[0])


def test_files_are_hashed_once(
    encoder: LatentEncoder, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    for module in (hashes_of_files, shared_hashing):
        monkeypatch.setattr(module, "hash_file", count)
    rows = [make_row(path.stem, video=path) for path in clips[:3]]
    build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS)), tmp_path / "out")
    assert sorted(hashed) == sorted(clips[:3])
    assert [row["source_hash"] for row in read_rows(tmp_path / "out")] == [hash_file(path) for path in clips[:3]]
    hashed.clear()
    hashes = hash_files(path for row in rows for path in row.files)
    request_digest(rows, {}, hashes=hashes)
    build(rows, ClipEncoder(encoder, ClipSettings(**SETTINGS), hashes), tmp_path / "again")
    assert sorted(hashed) == sorted(clips[:3])


def test_content_tells_files_of_equal_size_and_time_apart(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    rows = [make_row("a", video=path)]
    digests = []
    for content in (b"first", b"other", b"first"):
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
        digests.append([request_digest(rows, {}), request_digest(rows, {}, hashes=hash_files([path]))])
    assert digests[0][0] == digests[1][0] == digests[2][0]
    assert digests[0][1] != digests[1][1]
    assert digests[0][1] == digests[2][1]
