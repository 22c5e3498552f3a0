import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.keep import parse_keep
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.prompts import VideoPrompt
from hy_prfl.data.video import read_video
from hy_prfl.inference.calibration import cheapest, cheapest_schedules, choose
from hy_prfl.inference.generation import generate_videos
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.inference.video_files import VideoSettings
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts.generate import main


SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5, "max_sequence_length": 16}
PROMPTS = [{"caption": "a red circle", "id": "red", "seed": 3}, {"caption": "a blue square", "id": "blue", "seed": 8}]


@pytest.fixture(scope="module")
def reward_dir(pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "reward"
    vae = AutoencoderKLWan.from_pretrained(pipeline_dir, subfolder="vae")
    torch.manual_seed(2)
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint=vae_fingerprint(vae)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def options(tmp_path: Path, pipeline_dir: Path, reward_dir: Path) -> Callable[..., list[str]]:
    def make(**values: Any) -> list[str]:
        (tmp_path / "prompts.json").write_text(json.dumps(values.pop("rows", PROMPTS)))
        common = {"prompts": tmp_path / "prompts.json", "output_dir": tmp_path / "out", "dtype": "float32"}
        common |= {"pretrained_model_name_or_path": pipeline_dir, "reward_model": reward_dir, "num_candidates": 4}
        given = {name: value for name, value in {**common, **SIZE, **values}.items() if value is not None}
        return [f"--{name}={value}" for name, value in given.items()]

    return make


def pixels(path: Path) -> np.ndarray:
    return read_video(path, fps=16, num_frames=5)


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "candidates.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_videos_table_and_rerun(
    tmp_path: Path, pipeline_dir: Path, options: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(options(keep="1:3,3:1"))
    output_dir = tmp_path / "out"
    names = ["red_seed_3.mp4", "blue_seed_8.mp4"]
    others = ["generate.yaml", "manifest.json", "candidates", "candidates.csv"]
    assert sorted(path.name for path in output_dir.iterdir()) == sorted([*names, *others])
    assert parse_config(GenerateConfig, ["--config", str(output_dir / "generate.yaml")]).keep == "1:3,3:1"
    rows = read_table(output_dir)
    assert [int(row["seed"]) for row in rows] == [3, 4, 5, 6, 8, 9, 10, 11]
    chosen = [int(row["seed"]) for row in rows if row["chosen"] == "1"]
    assert [row["dropped_after"] for row in rows].count("1") == 2
    assert [row["dropped_after"] for row in rows].count("3") == 4
    assert all(bool(row["logit_step3"]) == (row["dropped_after"] != "1") for row in rows)

    pipeline = load_pipeline(str(pipeline_dir), dtype=torch.float32)
    for name, row, seed in zip(names, PROMPTS, chosen, strict=True):
        prompt = VideoPrompt(id="plain", caption=str(row["caption"]), seed=seed)
        (path,) = generate_videos(pipeline, [prompt], tmp_path / "plain", VideoSettings(**SIZE))
        assert np.array_equal(pixels(path), pixels(output_dir / name))

    table = (output_dir / "candidates.csv").read_bytes()
    (output_dir / names[0]).unlink()
    (output_dir / "candidates.csv").unlink()
    main(options(keep="1:3,3:1"))
    assert "1 videos generated, 1 were there" in capsys.readouterr().out
    assert (output_dir / "candidates.csv").read_bytes() == table
    with pytest.raises(ValueError, match=r"\(keep\)"):
        main(options(keep="1:2,3:1"))
    (output_dir / "candidates" / "red_seed_3.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"red_seed_3\.json"):
        main(options(keep="1:3,3:1"))


def test_calibrate(tmp_path: Path, options: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    main(options(calibrate=True, calibrate_share=0.5))
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    rows = read_table(tmp_path / "out")
    logits = np.array([[float(row[f"logit_step{step}"]) for step in range(1, 5)] for row in rows]).reshape(2, 4, 4)
    final = np.array([float(row["final_logit"]) for row in rows]).reshape(2, 4)
    chosen = np.array([row["chosen"] == "1" for row in rows]).reshape(2, 4).argmax(1)
    assert (chosen == final.argmax(1)).all()
    # One of three blocks, and two forwards a step.
    front = cheapest_schedules(logits, final, num_inference_steps=5, reward_cost=1 / 6, num_final_timesteps=3)
    best = cheapest(front, 0.5)
    assert found["cost"] == pytest.approx(best.cost, abs=1e-4)
    keep = parse_keep(found["keep"])
    gain = final[[0, 1], choose(logits, final, keep)].mean() - final.mean()
    assert gain / (final.max(1).mean() - final.mean()) >= 0.5
    assert f"--keep {found['keep']} keeps" in capsys.readouterr().out


def test_guidance_of_one_candidate(tmp_path: Path, options: Callable[..., list[str]]) -> None:
    main(
        options(num_candidates=1, reward_guidance=0.5, output_dir=tmp_path / "guided")
        + ["--reward_guidance_steps", "2", "4"]
    )
    main(options(num_candidates=1, reward_model=None))
    name = "red_seed_3.mp4"
    assert not np.array_equal(pixels(tmp_path / "guided" / name), pixels(tmp_path / "out" / name))
    record = json.loads((tmp_path / "guided" / "candidates" / "red_seed_3.json").read_text())
    assert (record["num_forwards"], record["num_reward_forwards"], record["num_reward_backwards"]) == (10, 3, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward_model": None}, "`reward_model` must be given"),
        ({"num_candidates": 1}, "`reward_model` must be left out"),
        ({"num_candidates": 0}, "`num_candidates` must be at least 1"),
        (
            {"num_candidates": 1, "reward_model": None, "keep": "2:1"},
            "`keep` must be left out with `num_candidates` 1",
        ),
        ({"keep": "2-1"}, "`keep` must be a list"),
        ({"keep": "2:4"}, "`keep` must be fewer than the 4"),
        ({"keep": "5:1"}, "`keep` must be before the last step"),
        ({"num_videos_per_prompt": 2}, "`num_videos_per_prompt` must be 1"),
        ({"step_cache": "first_block"}, "`step_cache` must be none"),
        ({"resample": True}, "`resample` must be false without `keep`"),
        (
            {"calibrate": True, "keep": None, "num_inference_steps": 1},
            "`num_inference_steps` must be at least 2 with `calibrate`",
        ),
        ({"calibrate": True, "keep": "2:1"}, "`keep` must be left out with `calibrate`"),
        ({"renoise": 0}, "`renoise`"),
        ({"reward_guidance": 0.1}, "`reward_guidance_steps` must be given"),
        ({"reward_guidance": -0.1}, "`reward_guidance` must be greater than 0"),
        ({"final_timesteps": 1001}, "`final_timesteps`"),
        ({"rows": [PROMPTS[0], {**PROMPTS[0], "seed": 5}]}, "seeds 3 to 6, and the list asks for 5 too"),
    ],
)
def test_bad_options(tmp_path: Path, options: Callable[..., list[str]], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(options(**values))
    assert not (tmp_path / "out").exists()


def test_a_reward_model_that_does_not_fit(tmp_path: Path, options: Callable[..., list[str]]) -> None:
    transformer = build_pipeline(num_layers=1).transformer
    WanRewardModel.from_transformer(transformer, 1, vae_fingerprint="other").save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="of another VAE than the latents that the reward model was trained on"):
        main(options(reward_model=tmp_path / "vae"))
    wide = build_pipeline(num_layers=1, image_to_video=True).transformer
    WanRewardModel.from_transformer(wide, 1).save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="`in_channels` 36 against 16"):
        main(options(reward_model=tmp_path / "image"))
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_two_processes_write_what_one_does(
    tmp_path: Path, options: Callable[..., list[str]], accelerate_launch: Callable[..., str]
) -> None:
    folders = (tmp_path / "out", tmp_path / "two")
    main(options(keep="1:3,3:1"))
    accelerate_launch("generate", *options(keep="1:3,3:1", output_dir=tmp_path / "two"), num_processes=2)
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1]
    # The last digit of a float depends on how a process was started.
    for one, two in zip(*map(read_table, folders), strict=True):
        assert [*one] == [*two]
        for name, value in one.items():
            is_logit = bool(value) and "logit" in name
            assert two[name] == value if not is_logit else float(two[name]) == pytest.approx(float(value), abs=1e-5)
    for name in ("red_seed_3.mp4", "blue_seed_8.mp4"):
        first, second = (pixels(folder / name).astype(int) for folder in folders)
        assert np.abs(first - second).max() <= 1
