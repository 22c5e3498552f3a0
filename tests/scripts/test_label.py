"""`label` as a user calls it, after a real `preprocess`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_from_disk

from hy_prfl.scripts.label import main
from hy_prfl.scripts.preprocess import main as preprocess


@pytest.fixture(scope="module")
def dataset(write_video: Callable[..., Path], pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    lines = ["video,caption,physics_quality"]
    for index, label in enumerate(("good", "poor", "")):
        write_video(folder / f"{index}.mp4", num_frames=5, seed=index)
        lines.append(f"{index}.mp4,a circle,{label}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    options = [f"--pretrained_model_name_or_path={pipeline_dir}", f"--manifest={folder / 'manifest.csv'}"]
    preprocess([*options, f"--output_dir={folder / 'dataset'}", "--num_frames=5", "--buckets", "32x48"])
    return folder / "dataset"


def test_labels_join_later(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.csv").write_text("id,physics_quality,human_quality\n2,0,poor\n0,,good\n")
    options = [f"--dataset={dataset}", f"--annotations={tmp_path / 'labels.csv'}", f"--output_dir={tmp_path / 'out'}"]
    main(options)
    labelled = load_from_disk(tmp_path / "out")
    assert labelled["physics_quality"][:] == [1, 0, 0]
    assert labelled["human_quality"][:] == [1, None, 0]
    assert labelled["text_alignment"][:] == [None, None, None]
    assert labelled["latents"][:] == load_from_disk(dataset)["latents"][:]
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert table["physics_quality"] == ["1", "2", "0"]
    assert table["human_quality"] == ["1", "1", "1"]
    assert table["motion_quality"] == ["1", "1", "1"]


def test_unknown_ids_and_contradictions(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,physics_quality\n0,poor\nz,1\n")
    options = [f"--dataset={dataset}", f"--annotations={tmp_path / 'labels.csv'}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="`id` 'z'"):
        main(options)
    with pytest.raises(ValueError, match="'0': `physics_quality` is 1 in the dataset and 0"):
        main([*options, "--unknown_ids=ignore"])
    assert not (tmp_path / "out").exists()
    main([*options, "--unknown_ids=ignore", "--overwrite=true"])
    assert load_from_disk(tmp_path / "out")["physics_quality"][:] == [0, 0, None]


@pytest.mark.parametrize(
    ("change", "error"), [("--annotations=nowhere.csv", FileNotFoundError), ("--unknown_ids=drop", ValueError)]
)
def test_bad_options(dataset: Path, tmp_path: Path, change: str, error: type[Exception]) -> None:
    options = [f"--dataset={dataset}", f"--annotations={dataset}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(error, match="nowhere.csv|unknown_ids"):
        main([*options, change])


@pytest.mark.launch
def test_accelerate_launch(dataset: Path, tmp_path: Path, accelerate_launch: Callable[..., str]) -> None:
    (tmp_path / "labels.json").write_text('[{"id": "1", "human_quality": "good"}]')
    options = [f"--dataset={dataset}", f"--annotations={tmp_path / 'labels.json'}", f"--output_dir={tmp_path / 'out'}"]
    accelerate_launch("label", *options)
    assert load_from_disk(tmp_path / "out")["human_quality"][1] == 1
