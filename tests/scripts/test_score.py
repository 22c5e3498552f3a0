import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hy_prfl.configs.parser import parse_config
from hy_prfl.configs.score import ScoreConfig
from hy_prfl.data.encoding import LatentEncoder
from hy_prfl.models.loading import load_transformer
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts.preprocess import main as preprocess
from hy_prfl.scripts.score import main


CLIPS = {"num_frames": 9, "buckets": "32x48", "max_sequence_length": 16}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, pipeline_dir: Path, write_video: Callable[..., Path]) -> Path:
    """Folder with a manifest of five labelled clips, the dataset made of it, and a reward model."""
    folder = tmp_path_factory.mktemp("score")
    rows = []
    for index in range(5):
        write_video(folder / f"clip{index}.mp4", seed=index)
        labels = {"physics_quality": index % 2, "human_quality": 1}
        rows.append({"id": f"clip{index}", "video": f"clip{index}.mp4", "caption": "a red circle", **labels})
    (folder / "manifest.json").write_text(json.dumps(rows))
    encoder = LatentEncoder.from_pretrained(str(pipeline_dir))
    reward_model = WanRewardModel.from_transformer(
        load_transformer(str(pipeline_dir)), num_layers=2, vae_fingerprint=encoder.vae_fingerprint
    )
    reward_model.save_pretrained(folder / "reward")
    preprocess(
        [
            f"--{name}={value}"
            for name, value in {
                "manifest": folder / "manifest.json",
                "pretrained_model_name_or_path": pipeline_dir,
                "output_dir": folder / "dataset",
                **CLIPS,
            }.items()
        ]
    )
    return folder


def from_manifest(work: Path, pipeline_dir: Path, output: Path, **values: Any) -> list[str]:
    common = {"reward_model": work / "reward", "manifest": work / "manifest.json", "output": output}
    common |= {"pretrained_model_name_or_path": pipeline_dir}
    return [f"--{name}={value}" for name, value in {**common, **CLIPS, **values}.items()]


def from_dataset(work: Path, output: Path, **values: Any) -> list[str]:
    common = {"reward_model": work / "reward", "dataset": work / "dataset", "output": output}
    return [f"--{name}={value}" for name, value in {**common, **values}.items()]


def test_videos_score_as_their_dataset(
    work: Path, pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*from_manifest(work, pipeline_dir, tmp_path / "videos.json"), "--timesteps", "300", "900"])
    main([*from_dataset(work, tmp_path / "dataset.json"), "--timesteps", "300", "900"])
    rows = json.loads((tmp_path / "videos.json").read_text())
    assert rows == json.loads((tmp_path / "dataset.json").read_text())
    assert [row["id"] for row in rows] == [f"clip{index}" for index in range(5)]
    assert [row["label"] for row in rows] == [0, 1, 0, 1, 0]
    assert {"reward_t300", "logit_t300", "reward_t900", "logit_t900", "reward", "logit"} <= set(rows[0])
    printed = capsys.readouterr().out
    assert "5 of 5 clips scored" in printed
    assert "auc/t900" in printed
    config = parse_config(ScoreConfig, ["--config", str(tmp_path / "videos.json.yaml")])
    assert config.timesteps == [300, 900]


def test_the_vae_works_in_tiles_if_asked_to(
    work: Path, pipeline_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([*from_manifest(work, pipeline_dir, tmp_path / "scores.csv", vae_tiling="on"), "--timesteps", "300"])
    assert "The VAE works in tiles: to encode 9 x 32 x 48 pixels" in caplog.text


def test_second_run_does_nothing(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.csv"
    main(from_dataset(work, output))
    time = output.stat().st_mtime_ns
    main(from_dataset(work, output))
    assert output.stat().st_mtime_ns == time
    assert capsys.readouterr().out.count("5 of 5 clips scored") == 2
    with pytest.raises(ValueError, match=r"different: seed"):
        main(from_dataset(work, output, seed=1))
    before = output.read_bytes()
    main(from_dataset(work, output, seed=1, overwrite=True))
    assert output.read_bytes() != before


def test_batch_size_does_not_matter(work: Path, tmp_path: Path) -> None:
    main(from_dataset(work, tmp_path / "one.json", num_noise_samples=2))
    main(from_dataset(work, tmp_path / "many.json", num_noise_samples=2, batch_size=3))
    one, many = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "many"))
    assert [row["id"] for row in one] == [row["id"] for row in many]
    for name in ("logit", "logit_t201", "logit_t1000"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in many], rel=1e-4, abs=1e-6)


def test_dataset_of_another_vae(work: Path, tmp_path: Path) -> None:
    reward_model = WanRewardModel.from_pretrained(str(work / "reward"))
    reward_model.register_to_config(vae_fingerprint="0123")
    reward_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another VAE"):
        main(from_dataset(work, tmp_path / "scores.csv", reward_model=tmp_path / "other"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "a"}, "`manifest` must be given, or else `dataset`"),
        ({"timesteps": 0}, "`timesteps` must be in"),
        ({"timesteps": 1001}, "`timesteps` must be in"),
        ({"timesteps": "x"}, "timesteps"),
        ({"num_noise_samples": 0}, "`num_noise_samples`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"seed": -1}, "`seed`"),
        ({"num_frames": 8}, "`num_frames`"),
        ({"buckets": "30x48"}, "`buckets`"),
        ({"reward": "a"}, "'reward' is not a field of ScoreConfig"),
    ],
)
def test_options(work: Path, pipeline_dir: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(from_manifest(work, pipeline_dir, tmp_path / "scores.csv", **values))


def test_options_that_need_each_other(work: Path, pipeline_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be given with `manifest`"):
        main(from_dataset(work, tmp_path / "scores.csv", pretrained_model_name_or_path=pipeline_dir))
    with pytest.raises(ValueError, match="`output` must be a .csv"):
        main(from_dataset(work, tmp_path / "scores.txt"))
    with pytest.raises(ValueError, match="`manifest` must be given"):
        main([f"--reward_model={work / 'reward'}", f"--output={tmp_path / 'scores.csv'}"])


@pytest.mark.launch
def test_launch_with_any_number_of_processes(
    work: Path, tmp_path: Path, accelerate_launch: Callable[..., str]
) -> None:
    tables = []
    for num_processes in (1, 2):
        output = tmp_path / f"scores{num_processes}.json"
        accelerate_launch("score", *from_dataset(work, output, batch_size=2), num_processes=num_processes)
        tables.append(json.loads(output.read_text()))
    for one, two in zip(*tables, strict=True):
        # Equal but for the last digits, which depend on how memory is aligned in a process.
        assert [one["id"], one["label"]] == [two["id"], two["label"]]
        names = [name for name in one if name.startswith(("reward", "logit"))]
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], rel=1e-5, abs=1e-7)
    assert not list(tmp_path.glob("*.partial*"))
