"""`preprocess` as a user calls it: order of the checks, kill and restart, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from hy_prfl.data.hashes import hash_file
from hy_prfl.data.labels import label_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.scripts.preprocess import main


ROOT = Path(__file__).parents[2]
NUM_CLIPS = 10


@pytest.fixture(scope="module")
def manifest(write_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips, of which one is damaged."""
    folder = tmp_path_factory.mktemp("manifest")
    rows = []
    for index in range(NUM_CLIPS):
        write_video(folder / f"clip_{index}.mp4", seed=index)
        rows.append({"video": f"clip_{index}.mp4", "caption": f"a red circle {index}", "blur_quality": index % 2})
    (folder / "clip_4.mp4").write_bytes(b"junk")
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


@pytest.fixture(scope="module")
def options(pipeline_dir: Path, manifest: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={pipeline_dir}",
        f"--manifest={manifest}",
        "--num_frames=9",
        "--shard_size=1",
        "--buckets",
        "32x48",
    ]


@pytest.fixture(scope="module")
def expected(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of a run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("expected") / "dataset"
    main([*options, f"--output_dir={output_dir}"])
    return output_dir


def comparable_rows(folder: Path) -> list[dict[str, Any]]:
    rows = table_to_rows(load_from_disk(folder).data.table)
    return [
        {name: getattr(value, "tobytes", lambda value=value: value)() for name, value in row.items()} for row in rows
    ]


def start(options: Sequence[str], launcher: Sequence[str] = ("-m", "hy_prfl.scripts.preprocess")) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_vae_works_in_tiles_if_asked_to(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([*options, f"--output_dir={tmp_path / 'dataset'}", "--vae_tiling=on"])
    assert "The VAE works in tiles: to encode 9 x 32 x 48 pixels" in caplog.text


def test_dataset_of_a_manifest(expected: Path) -> None:
    rows = table_to_rows(load_from_disk(expected).data.table)
    assert [row["id"] for row in rows] == [f"clip_{index}" for index in range(NUM_CLIPS) if index != 4]
    assert [row["blur_quality"] for row in rows] == [index % 2 for index in range(NUM_CLIPS) if index != 4]
    assert [row["prompt"] for row in rows][:2] == ["a red circle 0", "a red circle 1"]
    report = (expected / "report.jsonl").read_text().splitlines()
    assert len(report) == 1
    assert json.loads(report[0])["id"] == "clip_4"
    assert sorted(path.name for path in expected.parent.iterdir()) == ["dataset"]


def test_finished_dataset_is_left_alone(
    expected: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in expected.iterdir()}
    main([*options, f"--output_dir={expected}"])
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in expected.iterdir()} == before


def test_a_clip_replaced_by_one_of_equal_size_and_time(
    pipeline_dir: Path, write_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    (tmp_path / "manifest.json").write_text(json.dumps([{"video": "clip.mp4", "caption": "a red circle"}]))
    options = [
        f"--pretrained_model_name_or_path={pipeline_dir}",
        f"--manifest={tmp_path / 'manifest.json'}",
        "--num_frames=9",
        "--buckets=32x48",
    ]
    # Written once: x264 does not promise the same bytes twice. What is behind the last box of an mp4 is not read.
    contents = [write_video(clip, seed=seed).read_bytes().ljust(8000, b"\0") for seed in (0, 1)]
    found: dict[str, list[str]] = {"time": [], "content": []}
    for identity, text in (("time", "size and time stamp"), ("content", "content")):
        for content in contents:
            clip.write_bytes(content)
            os.utime(clip, (1e9, 1e9))
            main([*options, f"--output_dir={tmp_path / identity}", f"--file_identity={identity}"])
            assert f"Changed files are detected by {text} (`file_identity`)" in capsys.readouterr().out
            (row,) = table_to_rows(load_from_disk(tmp_path / identity).data.table)
            found[identity].append(row["source_hash"])
    assert found["time"][0] == found["time"][1] == found["content"][0]
    assert found["content"][1] == hash_file(clip)


def test_yaml_file(expected: Path, options: list[str], tmp_path: Path) -> None:
    values = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
    lines = [f"{name}: {value}" for name, value in values.items()]
    (tmp_path / "x.yaml").write_text("\n".join([*lines, "buckets: [32x48]", f"output_dir: {tmp_path / 'out'}"]))
    main(["--config", str(tmp_path / "x.yaml"), "--shard_size=4"])
    assert comparable_rows(tmp_path / "out") == comparable_rows(expected)


def test_killed_in_the_middle_and_started_again(
    expected: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir, partial_dir = tmp_path / "out", tmp_path / "out.partial"
    process = start([*options, f"--output_dir={output_dir}"])
    deadline = time.monotonic() + 120
    while not list(partial_dir.glob("shard-*.arrow")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_stored = len(list(partial_dir.glob("shard-*.arrow")))
    assert process.returncode == -signal.SIGKILL
    assert 0 < num_stored < NUM_CLIPS - 1
    assert not output_dir.exists()

    main([*options, f"--output_dir={output_dir}"])
    assert f"encoded now {NUM_CLIPS - 1 - num_stored}, bad 1" in capsys.readouterr().out
    assert comparable_rows(output_dir) == comparable_rows(expected)
    assert not partial_dir.exists()


@pytest.mark.launch
@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerate_launch_gives_the_same_dataset(
    expected: Path, options: list[str], tmp_path: Path, num_processes: int
) -> None:
    config_file = ROOT / "accelerate_configs" / ("cpu.yaml" if num_processes == 1 else "ddp_cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", f"--config_file={config_file}", "-m", "hy_prfl.scripts.preprocess"]
    process = start([*options, f"--output_dir={tmp_path / 'out'}"], launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count(f"clips {NUM_CLIPS - 1}, encoded now {NUM_CLIPS - 1}, bad 1") == 1
    assert comparable_rows(tmp_path / "out") == comparable_rows(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_frames=8"], "`num_frames` must be of the form 4k"),
        (["--min_num_frames=13"], "`min_num_frames` must be between 1 and num_frames"),
        (["--fps=0"], "`fps` must be greater than 0"),
        (["--buckets", "32*48"], "`buckets` must be sizes HEIGHTxWIDTH"),
        (["--buckets", "30x48"], "`buckets` must be sizes HEIGHTxWIDTH with sides that are multiples of 16"),
        (["--buckets", "0x48"], "`buckets` must be sizes"),
        (["--resolution=500"], "`resolution` must be a multiple of 32"),
        (["--max_aspect_ratio=0.5"], "`max_aspect_ratio` must be at least 1"),
        (["--max_sequence_length=0"], "`max_sequence_length` must be at least 1"),
        (["--shard_size=0"], "`shard_size` must be at least 1"),
        (["--batch_size=0"], "`batch_size` must be at least 1"),
        (["--num_workers=-1"], "`num_workers` must be at least 0"),
        (["--tensor_dtype=float8"], "tensor_dtype"),
        (["--upstream_meta=x"], "`manifest` must be given, or else `upstream_meta`"),
        (["--null_prompt_path=x"], "`null_prompt_path` must be left out"),
        (["--no_such_option=1"], "no_such_option"),
    ],
)
def test_bad_options_are_refused_by_name(options: list[str], tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*options, f"--output_dir={tmp_path / 'out'}", *changes])
    assert list(tmp_path.iterdir()) == []


def test_models_are_loaded_last(manifest: Path, pipeline_dir: Path, tmp_path: Path) -> None:
    """A pipeline folder without weights is enough to get every other error."""
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text((pipeline_dir / "model_index.json").read_text())
    fixed = [f"--pretrained_model_name_or_path={pipeline}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        main([*fixed, f"--manifest={tmp_path / 'nowhere.json'}"])
    (tmp_path / "broken.json").write_text('[{"caption": "x"}]')
    with pytest.raises(ValueError, match="broken.json, row 1: `video` is missing"):
        main([*fixed, f"--manifest={tmp_path / 'broken.json'}"])
    with pytest.raises(ValueError, match="`buckets` must have exactly one size"):
        main([*fixed, f"--manifest={manifest}", "--prompts_only=true"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out' is not empty"):
        main([*fixed, f"--manifest={manifest}"])
    assert not (tmp_path / "out.partial").exists()


def test_labelled_dataset_is_not_replaced(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"--output_dir={tmp_path / 'out'}"
    main([*options, output])
    label_dataset(str(tmp_path / "out"), {"clip_0": {"human_quality": 1}}, tmp_path / "out")
    main([*options, output])
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="labels that `label` merged; these would be lost"):
        main([*options, output, "--tensor_dtype=float32"])


@pytest.fixture
def finished(expected: Path, tmp_path: Path) -> Path:
    """A finished dataset of ten clips, nine of them good, that a test may change."""
    return Path(shutil.copytree(expected, tmp_path / "out"))


def test_finished_dataset_is_not_replaced_by_one_with_other_options(
    finished: Path, expected: Path, options: list[str]
) -> None:
    command = [*options, f"--output_dir={finished}"]
    for changes, names in (
        (["--fps=8"], "fps"),
        (["--max_sequence_length=256", "--num_frames=5", "--min_num_frames=5"], "max_sequence_length, .*num_frames"),
        (["--buckets=48x32"], "buckets"),
        (["--tensor_dtype=float32"], "tensor_dtype"),
    ):
        with pytest.raises(ValueError, match=rf"'.*out' holds .* other options \(different: {names}.*`overwrite`"):
            main([*command, *changes])
    assert comparable_rows(finished) == comparable_rows(expected)
    assert not finished.with_name("out.partial").exists()
    main([*command, "--num_frames=5", "--overwrite"])
    assert {row["num_frames"] for row in comparable_rows(finished)} == {5}
    main([*command, "--num_frames=5", "--shard_size=3", "--batch_size=2", "--num_workers=0"])


def test_rows_of_a_finished_dataset_are_not_dropped_unless_asked_for(
    finished: Path, expected: Path, options: list[str], manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"video": str(manifest.parent / row["video"])} for row in json.loads(manifest.read_text())]
    fewer, more = finished.parent / "fewer.json", finished.parent / "more.json"
    fewer.write_text(json.dumps(rows[:7]))
    more.write_text(json.dumps([*rows, {"id": "another", "video": rows[0]["video"], "caption": "a blue square"}]))
    command = [*options, f"--output_dir={finished}"]
    with pytest.raises(
        ValueError, match="3 of its encoded clips would be lost. The first one is 'clip_7'.*`overwrite`"
    ):
        main([*command, f"--manifest={fewer}"])
    assert comparable_rows(finished) == comparable_rows(expected)
    main([*command, f"--manifest={more}"])
    assert comparable_rows(finished)[:-1] == comparable_rows(expected)
    capsys.readouterr()
    main([*command, f"--manifest={fewer}", "--overwrite"])
    assert "encoded now 0, bad 1, dropped 4" in capsys.readouterr().out
    assert comparable_rows(finished) == comparable_rows(expected)[:6]


def test_clips_whose_files_are_gone_stay_in_a_finished_dataset(
    finished: Path, expected: Path, options: list[str], manifest: Path
) -> None:
    folder = Path(shutil.copytree(manifest.parent, finished.with_name("clips")))
    (folder / "clip_2.mp4").unlink()
    rows = json.loads(manifest.read_text())
    (folder / "manifest.json").write_text(json.dumps([*rows, {"id": "b", "video": "clip_1.mp4", "caption": "b"}]))
    command = [*options, f"--output_dir={finished}", f"--manifest={folder / 'manifest.json'}"]
    with pytest.raises(
        ValueError, match="1 of its encoded clips would be lost. The first one is 'clip_2': there is neither"
    ):
        main(command)
    assert comparable_rows(finished) == comparable_rows(expected)
    main([*command, "--overwrite=true"])
    assert [row["id"] for row in comparable_rows(finished)] == [
        f"clip_{index}" for index in range(NUM_CLIPS) if index not in (2, 4)
    ] + ["b"]


def test_prompts_only(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("caption\na red circle\na blue square\n")
    output_dir = tmp_path / "out"
    main([*options, f"--manifest={tmp_path / 'prompts.csv'}", f"--output_dir={output_dir}", "--prompts_only=true"])
    rows = table_to_rows(load_from_disk(output_dir).data.table)
    assert [(row["id"], row["latents"]) for row in rows] == [("prompt_000000", None), ("prompt_000001", None)]
    assert rows[0]["latents_shape"] == [16, 3, 4, 6]


def test_upstreams_input_list_as_it_ships(
    pipeline_dir: Path, write_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths from the working directory; what is there is encoded, the rest is reported with both places."""
    folder = tmp_path / "temp_data"
    (folder / "videos").mkdir(parents=True)
    rows = [
        {
            "source_id": name,
            "long_caption": f"A long text on {name}.",
            "short_caption": f"Clip {name}.",
            "video_path": f"temp_data/videos/{name}.mp4",
        }
        for name in ("0004e6", "00086a", "0012a9")
    ]
    (folder / "temp_input_data.json").write_text(json.dumps([*rows, rows[0]], indent=4))
    for name in ("0004e6", "0012a9"):
        write_video(folder / "videos" / f"{name}.mp4")
    monkeypatch.chdir(tmp_path)
    options = ["--manifest", "temp_data/temp_input_data.json", "--num_frames", "9", "--buckets", "32x48"]
    main([*options, f"--pretrained_model_name_or_path={pipeline_dir}", "--output_dir", "out"])
    rows = table_to_rows(load_from_disk("out").data.table)
    assert [(row["id"], row["prompt"], row["long_prompt"]) for row in rows] == [
        (name, f"Clip {name}.", f"A long text on {name}.") for name in ("0004e6", "0012a9")
    ]
    (line,) = (tmp_path / "out" / "report.jsonl").read_text().splitlines()
    places = [f"'{tmp_path}/{folder}temp_data/videos/00086a.mp4'" for folder in ("", "temp_data/")]
    assert json.loads(line)["reason"] == f"there is neither {places[0]} nor {places[1]}"
