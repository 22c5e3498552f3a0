"""Folders as HY-Video-PRFL writes them, made here by hand, become rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.data.schema import LABELS, table_to_rows, unpack_tensor
from hy_prfl.data.store import build_dataset
from hy_prfl.data.upstream import UpstreamImporter, read_upstream
from hy_prfl.data.video import VideoError, read_video, to_float
from hy_prfl.scripts.preprocess import main


NUM_TOKENS = 5


@pytest.fixture(scope="module")
def i2v_encoder(i2v_pipeline_dir: Path) -> LatentEncoder:
    return LatentEncoder.from_pretrained(str(i2v_pipeline_dir))


def write_clip(root: Path, name: str, *, seed: int = 0, mask: bool = False, **fields: Any) -> dict[str, np.ndarray]:
    """The files of one clip in upstream's layout below `root`, paths relative to `root`; returns its arrays."""
    rng = np.random.default_rng(seed)
    text = np.zeros((1, 512, 32), np.float32)
    text[:, :NUM_TOKENS] = rng.normal(size=(1, NUM_TOKENS, 32))
    arrays = {
        "vae_latent_path": rng.normal(size=(1, 16, 3, 4, 6)).astype(np.float32),
        "f1_black_path": rng.normal(size=(1, 20 if mask else 16, 3, 4, 6)).astype(np.float32),
        "imgclip_path": rng.normal(size=(1, 5, 32)).astype(np.float32),
        "textshort_path": text,
        "textlong_path": text * 2,
    }
    meta: dict[str, Any] = {
        "source_id": name,
        "short_caption": "a red circle",
        "long_caption": "a red circle moves to the right",
        "video_path": f"videos/{name}.mp4",
    }
    for field, array in arrays.items():
        path = Path("480") / field / f"{name}.npy"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(root / path, array)
        meta[field] = str(path)
    (root / "480" / "meta_v1").mkdir(exist_ok=True)
    meta = {key: value for key, value in (meta | fields).items() if value != "absent"}
    (root / "480" / "meta_v1" / f"{name}_meta_v1.json").write_text(json.dumps(meta))
    return arrays


def import_rows(
    root: Path, encoder: LatentEncoder, output_dir: Path, path: str = "480/meta_v1"
) -> list[dict[str, Any]]:
    rows = read_upstream(root / path, root)
    importer = UpstreamImporter(encoder, 16.0, "float32", None)
    build_dataset(rows, importer, output_dir, digest="", tensor_dtype="float32")
    return table_to_rows(load_from_disk(output_dir).data.table)


def test_arrays_become_columns(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    labels = {"text_alignment": 1, "blur_quality": "poor", "physics_quality": None}
    arrays = write_clip(tmp_path, "clip", **labels)
    (row,) = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    expected = {
        "latents": arrays["vae_latent_path"][0],
        "image_embeds": arrays["imgclip_path"][0],
        "prompt_embeds": arrays["textshort_path"][0, :NUM_TOKENS],
        "long_prompt_embeds": arrays["textlong_path"][0, :NUM_TOKENS],
        "null_prompt_embeds": i2v_encoder.encode_prompt("").numpy(),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(unpack_tensor(row, name), value)
    assert [row[name] for name in LABELS] == [1, 0, None, None]
    assert (row["id"], row["prompt"]) == ("clip", "a red circle")
    assert (row["long_prompt"], row["source"]) == ("a red circle moves to the right", "videos/clip.mp4")
    assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (9, 32, 48, 16.0)
    assert row["vae_fingerprint"] == i2v_encoder.vae_fingerprint


def test_mask_of_the_condition_is_the_pipelines(
    i2v_encoder: LatentEncoder, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    frames = to_float(read_video(write_video(tmp_path / "clip.mp4"), 16, 9))
    _, expected = i2v_encoder.encode_condition(frames)
    write_clip(tmp_path, "clip")
    np.save(tmp_path / "480" / "f1_black_path" / "clip.npy", expected[None, 4:].numpy())
    (row,) = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    np.testing.assert_array_equal(unpack_tensor(row, "condition"), expected.numpy())


def test_condition_with_a_mask_is_taken_as_it_is(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    arrays = write_clip(tmp_path, "clip", mask=True)
    (row,) = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    np.testing.assert_array_equal(unpack_tensor(row, "condition"), arrays["f1_black_path"][0])


def test_text_to_video_takes_no_image_columns(pipeline_dir: Path, tmp_path: Path) -> None:
    write_clip(tmp_path, "clip", f1_black_path="absent")
    (row,) = import_rows(tmp_path, LatentEncoder.from_pretrained(str(pipeline_dir)), tmp_path / "out")
    assert row["condition"] is None
    assert row["image_embeds"] is None


def test_other_names_of_the_same_fields(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    write_clip(
        tmp_path,
        "clip",
        vae_latent_path="absent",
        video_vae_latent_path="480/vae_latent_path/clip.npy",
        f1_black_path="absent",
        latents_condition_path="480/f1_black_path/clip.npy",
        imgclip_path="absent",
        image_embeds="480/imgclip_path/clip.npy",
        textshort_path="absent",
        text_en_path="480/textshort_path/clip.npy",
        short_caption="absent",
        prompt="a red circle",
    )
    (row,) = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    assert row["prompt"] == "a red circle"
    assert row["condition_shape"] == [20, 3, 4, 6]


def test_lists_of_meta_files(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    for index, name in enumerate("cab"):
        write_clip(tmp_path, name, seed=index)
    lines = ["480/meta_v1/c_meta_v1.json", "480/meta_v1/b_meta_v1.json", ""]
    (tmp_path / "data.list").write_text("\n".join(lines))
    rows = import_rows(tmp_path, i2v_encoder, tmp_path / "out", path="data.list")
    assert [row["id"] for row in rows] == ["c", "b"]
    assert [row.id for row in read_upstream(tmp_path / "480" / "meta_v1", tmp_path)] == ["a", "b", "c"]


def test_paths_beside_the_json_go_first(tmp_path: Path) -> None:
    write_clip(tmp_path, "clip")
    (row,) = read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
    assert row.find("latents") == tmp_path / "480/vae_latent_path/clip.npy"
    beside = tmp_path / "480/meta_v1/480/vae_latent_path/clip.npy"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert row.find("latents") == beside


def test_from_the_command_line(i2v_pipeline_dir: Path, tmp_path: Path) -> None:
    write_clip(tmp_path, "a")
    write_clip(tmp_path, "b", seed=1, human_quality="good")
    np.save(tmp_path / "null.npy", np.ones((1, 3, 32), np.float32))
    options = [f"--pretrained_model_name_or_path={i2v_pipeline_dir}", f"--output_dir={tmp_path / 'out'}"]
    options += [f"--upstream_meta={tmp_path / '480/meta_v1'}", f"--upstream_root={tmp_path}"]
    main([*options, f"--null_prompt_path={tmp_path / 'null.npy'}"])
    rows = table_to_rows(load_from_disk(tmp_path / "out").data.table)
    assert [(row["id"], row["human_quality"]) for row in rows] == [("a", None), ("b", 1)]
    assert [row["null_prompt_embeds_shape"] for row in rows] == [[3, 32], [3, 32]]
    assert rows[0]["latents"].dtype == np.float16


def test_null_prompt_of_upstream(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    null = np.zeros((1, 512, 32), np.float32)
    null[:, :2] = 3.0
    np.save(tmp_path / "null.npy", null)
    importer = UpstreamImporter(i2v_encoder, 16.0, "float16", str(tmp_path / "null.npy"))
    np.testing.assert_array_equal(importer.null_prompt_embeds, null[0, :2])


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        ("vae_latent_path", np.zeros((1, 12, 3, 4, 6)), "expected latents of 16 channels"),
        ("vae_latent_path", np.zeros((16, 3)), "expected 4 dimensions"),
        ("vae_latent_path", np.zeros((2, 16, 3, 4, 6)), "expected 4 dimensions"),
        ("vae_latent_path", np.zeros((1, 16, 3, 5, 6)), "must be even"),
        ("vae_latent_path", np.full((1, 16, 3, 4, 6), np.nan), "holds a NaN"),
        ("f1_black_path", np.zeros((1, 17, 3, 4, 6)), "expected 16 or 20 channels"),
        ("f1_black_path", np.zeros((1, 16, 2, 4, 6)), "expected 16 or 20 channels beside latents"),
        ("imgclip_path", np.zeros((1, 5, 31)), "expected 1 image of 5 tokens and an image width of 32, got shape"),
        ("textshort_path", np.zeros((1, 512, 4096)), "expected a text width of 32"),
        ("textlong_path", np.zeros((32,)), "expected 2 dimensions"),
    ],
)
def test_arrays_that_do_not_fit_are_bad_clips(
    i2v_encoder: LatentEncoder, tmp_path: Path, column: str, array: np.ndarray, message: str
) -> None:
    write_clip(tmp_path, "clip")
    np.save(tmp_path / "480" / column / "clip.npy", array)
    (row,) = read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
    with pytest.raises(VideoError, match=message):
        UpstreamImporter(i2v_encoder, 16.0, "float32", None).read_row(row)


def test_missing_and_damaged_arrays_are_bad_clips(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    for index, name in enumerate(("good", "missing", "damaged", "archive", "silent", "incomplete")):
        write_clip(tmp_path, name, seed=index)
    write_clip(tmp_path, "silent", seed=3, short_caption="absent", long_caption="")
    write_clip(tmp_path, "incomplete", seed=4, imgclip_path="absent")
    (tmp_path / "480/vae_latent_path/missing.npy").unlink()
    (tmp_path / "480/vae_latent_path/damaged.npy").write_bytes(b"junk")
    with open(tmp_path / "480/vae_latent_path/archive.npy", "wb") as file:
        np.savez(file, latents=np.zeros(3))
    rows = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    assert [row["id"] for row in rows] == ["good"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    both = ("480/meta_v1/480/vae_latent_path/missing.npy", "480/vae_latent_path/missing.npy")
    assert all(str(tmp_path / path) in reasons["missing"] for path in both)
    assert "not a valid .npy file" in reasons["damaged"]
    assert "not a valid .npy file" in reasons["archive"]
    assert reasons["silent"] == "no caption"
    assert "`imgclip_path` is missing in" in reasons["incomplete"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vae_latent_path": "absent"}, "`vae_latent_path` is missing"),
        ({"textshort_path": "absent"}, "`textshort_path` is missing"),
        ({"physics_quality": "great"}, "`physics_quality` must be 1, 0"),
        ({"short_caption": 1.5}, "`short_caption` must be text"),
    ],
)
def test_broken_meta_files_stop_at_once(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_clip(tmp_path, "clip", **fields)
    with pytest.raises(ValueError, match="clip_meta_v1.json: " + message):
        read_upstream(tmp_path / "480" / "meta_v1", tmp_path)


def test_broken_folders_and_lists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_upstream(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no `\\*_meta_v1.json` files"):
        read_upstream(tmp_path)
    (tmp_path / "x_meta_v1.json").write_text("{")
    with pytest.raises(ValueError, match="x_meta_v1.json: not valid JSON"):
        read_upstream(tmp_path)
    (tmp_path / "x_meta_v1.json").write_text("[]")
    with pytest.raises(ValueError, match="x_meta_v1.json: expected a mapping"):
        read_upstream(tmp_path)
    (tmp_path / "data.list").write_text("gone.json\n")
    with pytest.raises(FileNotFoundError, match=f"neither '{tmp_path}/gone.json' nor 'root/gone.json'"):
        read_upstream(tmp_path / "data.list", "root")


def test_a_list_that_repeats_its_clips_imports_each_once(
    i2v_encoder: LatentEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published lists name each of three clips six times: epochs of a run that sees each line once."""
    for index, name in enumerate("abc"):
        write_clip(tmp_path, name, seed=index)
    lines = [f"480/meta_v1/{name}_meta_v1.json" for name in "acb"]
    (tmp_path / "data.list").write_text("\n".join(lines * 6))
    rows = import_rows(tmp_path, i2v_encoder, tmp_path / "out", path="data.list")
    assert [row["id"] for row in rows] == ["a", "c", "b"]
    assert "data.list: 18 lines name 3 clips" in caplog.text
    assert "train for more epochs instead of repeating clips" in caplog.text
    assert "weight" not in caplog.text


def test_repeats_of_uneven_number_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index, name in enumerate("ab"):
        write_clip(tmp_path, name, seed=index)
    # The same file under other names is the same clip.
    lines = ["480/meta_v1/a_meta_v1.json", str(tmp_path / "480/meta_v1/../meta_v1/a_meta_v1.json")]
    lines += ["./480/meta_v1/a_meta_v1.json", "480/meta_v1/b_meta_v1.json"]
    (tmp_path / "data.list").write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert [row.id for row in read_upstream(tmp_path / "data.list", tmp_path)] == ["a", "b"]
    assert "named 1 to 3 times; these weights are not kept" in caplog.text


def test_a_copy_of_a_meta_file_is_the_same_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path, "a")
    meta = tmp_path / "480/meta_v1/a_meta_v1.json"
    (tmp_path / "480/meta_v1/copy_meta_v1.json").write_text(json.dumps(json.loads(meta.read_text()), indent=4))
    assert [row.id for row in read_upstream(tmp_path / "480/meta_v1", tmp_path)] == ["a"]
    assert "2 files name 1 clips" in caplog.text


def test_different_clips_of_one_id_are_both_named(tmp_path: Path) -> None:
    write_clip(tmp_path, "a")
    write_clip(tmp_path, "b", seed=1, source_id="a")
    with pytest.raises(ValueError, match="b_meta_v1.json: `id` 'a' is already taken by .*a_meta_v1.json.*`video`"):
        read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
    # The same arrays under another label are no repeat either.
    meta = tmp_path / "480/meta_v1/a_meta_v1.json"
    other = json.loads(meta.read_text()) | {"physics_quality": 1}
    (tmp_path / "480/meta_v1/b_meta_v1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="b_meta_v1.json: `id` 'a' is already taken by .*a_meta_v1.json.*`labels`"):
        read_upstream(tmp_path / "480" / "meta_v1", tmp_path)


def test_prompts_longer_than_the_sequence_are_bad_clips(i2v_pipeline_dir: Path, tmp_path: Path) -> None:
    write_clip(tmp_path, "clip")
    (row,) = read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
    encoder = LatentEncoder.from_pretrained(str(i2v_pipeline_dir), max_sequence_length=NUM_TOKENS - 1)
    with pytest.raises(VideoError, match="clip.npy': 5 tokens, `max_sequence_length` is 4"):
        UpstreamImporter(encoder, 16.0, "float32", None).read_row(row)


class TestFirstAndLastFrame:
    """Upstream's trainer knows the task `flf2v`: embeddings `(2, tokens, width)` or flat, and a condition."""

    @pytest.fixture(scope="class")
    def encoder(self, flf2v_pipeline_dir: Path) -> LatentEncoder:
        return LatentEncoder.from_pretrained(str(flf2v_pipeline_dir))

    @pytest.fixture
    def expected(
        self, encoder: LatentEncoder, write_video: Callable[..., Path], tmp_path: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the pipeline itself makes of the first and the last frame of a clip."""
        frames = to_float(read_video(write_video(tmp_path / "clip.mp4"), 16, 9))
        image_embeds, condition = encoder.encode_condition(frames)
        assert image_embeds is not None
        return image_embeds.numpy(), condition.numpy()

    @pytest.mark.parametrize("shape", [(2, 5, 32), (1, 10, 32), (10, 32), (1, 2, 5, 32)])
    @pytest.mark.parametrize("mask", [False, True])
    def test_arrays(
        self,
        encoder: LatentEncoder,
        expected: tuple[np.ndarray, np.ndarray],
        tmp_path: Path,
        shape: tuple[int, ...],
        mask: bool,
    ) -> None:
        write_clip(tmp_path, "clip")
        np.save(tmp_path / "480/imgclip_path/clip.npy", expected[0].reshape(shape))
        np.save(tmp_path / "480/f1_black_path/clip.npy", expected[1][None, 0 if mask else 4 :])
        (row,) = import_rows(tmp_path, encoder, tmp_path / "out")
        np.testing.assert_array_equal(unpack_tensor(row, "image_embeds"), expected[0])
        np.testing.assert_array_equal(unpack_tensor(row, "condition"), expected[1])

    def test_arrays_of_one_frame_are_refused(
        self, encoder: LatentEncoder, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
    ) -> None:
        write_clip(tmp_path, "clip")
        (row,) = read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
        importer = UpstreamImporter(encoder, 16.0, "float32", None)
        with pytest.raises(VideoError, match=r"clip.npy': expected 2 images of 5 tokens.*got shape \(1, 5, 32\)"):
            importer.read_row(row)
        np.save(tmp_path / "480/imgclip_path/clip.npy", expected[0])
        condition = expected[1].copy()
        condition[3, -1] = 0
        np.save(tmp_path / "480/f1_black_path/clip.npy", condition[None])
        with pytest.raises(VideoError, match="clip.npy': its mask .* the first and the last frame"):
            importer.read_row(row)

    def test_two_images_are_refused_by_a_pipeline_of_one(
        self, i2v_encoder: LatentEncoder, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
    ) -> None:
        write_clip(tmp_path, "clip")
        for embeds in (expected[0], expected[0].reshape(1, 10, 32)):
            np.save(tmp_path / "480/imgclip_path/clip.npy", embeds)
            (row,) = read_upstream(tmp_path / "480" / "meta_v1", tmp_path)
            with pytest.raises(VideoError, match="clip.npy': expected 1 image of 5 tokens"):
                UpstreamImporter(i2v_encoder, 16.0, "float32", None).read_row(row)


def test_embeddings_of_the_importer_and_the_encoder_agree(i2v_encoder: LatentEncoder, tmp_path: Path) -> None:
    write_clip(tmp_path, "clip")
    prompt_embeds = i2v_encoder.encode_prompt("a red circle")
    padded = torch.nn.functional.pad(prompt_embeds, (0, 0, 0, 512 - len(prompt_embeds)))
    np.save(tmp_path / "480/textshort_path/clip.npy", padded[None].numpy())
    (row,) = import_rows(tmp_path, i2v_encoder, tmp_path / "out")
    np.testing.assert_array_equal(unpack_tensor(row, "prompt_embeds"), prompt_embeds.numpy())
