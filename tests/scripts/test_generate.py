import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.prompts import VideoPrompt
from hy_prfl.data.video import read_video
from hy_prfl.inference.generation import generate_videos
from hy_prfl.inference.pipelines import load_pipeline
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.inference.video_files import VideoSettings, read_record
from hy_prfl.scripts.generate import main


SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
PROMPTS = [{"caption": "a red circle", "id": "red"}, {"caption": "a blue square", "seed": 9}, {"caption": "a star"}]


def write_prompts(folder: Path, prompts: Any = PROMPTS) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    return path


def options(folder: Path, pipeline_dir: Path, **values: Any) -> list[str]:
    common = {"prompts": folder / "prompts.json", "output_dir": folder / "out", "dtype": "float32"}
    common |= {"pretrained_model_name_or_path": pipeline_dir}
    return [f"--{name}={value}" for name, value in {**common, **SIZE, **values}.items()]


def test_videos_manifest_and_rerun(tmp_path: Path, pipeline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path)
    main(options(tmp_path, pipeline_dir, seed=4, flow_shift=7.0))
    output_dir = tmp_path / "out"
    names = ["red_seed_4.mp4", "00001_seed_9.mp4", "00002_seed_4.mp4"]
    assert sorted(path.name for path in output_dir.iterdir()) == sorted([*names, "generate.yaml", "manifest.json"])
    assert [row["video"] for row in json.loads((output_dir / "manifest.json").read_text())] == names
    saved = parse_config(GenerateConfig, ["--config", str(output_dir / "generate.yaml")])
    assert (saved.flow_shift, saved.seed) == (7.0, 4)
    assert "3 videos generated, 0 were there" in capsys.readouterr().out

    pipeline = load_pipeline(str(pipeline_dir), flow_shift=7.0, dtype=torch.float32)
    prompt = VideoPrompt(id="00001", caption="a blue square", seed=9)
    (path,) = generate_videos(pipeline, [prompt], tmp_path / "expected", VideoSettings(**SIZE))
    assert np.array_equal(pixels(path), pixels(output_dir / path.name))

    (output_dir / names[0]).unlink()
    (output_dir / "manifest.json").unlink()
    main(options(tmp_path, pipeline_dir, seed=4, flow_shift=7.0))
    assert "1 videos generated, 2 were there" in capsys.readouterr().out
    assert (output_dir / names[0]).is_file()
    main(options(tmp_path, pipeline_dir, seed=4, flow_shift=7.0))
    assert "0 videos generated, 3 were there" in capsys.readouterr().out

    with pytest.raises(ValueError, match=r"\(flow_shift\)"):
        main(options(tmp_path, pipeline_dir, seed=4))
    main(options(tmp_path, pipeline_dir, seed=4, overwrite=True))
    assert not np.array_equal(pixels(path), pixels(output_dir / path.name))


def pixels(path: Path) -> np.ndarray:
    return read_video(path, fps=16, num_frames=5)


def test_the_vae_works_in_tiles_if_asked_to(
    tmp_path: Path, pipeline_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_prompts(tmp_path, PROMPTS[:1])
    main(options(tmp_path, pipeline_dir, vae_tiling="on"))
    assert "The VAE works in tiles: to decode 5 x 32 x 48 pixels" in caplog.text


def test_another_transformer_under_the_same_path_is_noticed(tmp_path: Path, pipeline_dir: Path) -> None:
    write_prompts(tmp_path)
    build_pipeline(num_layers=3, seed=1).transformer.save_pretrained(tmp_path / "tuned")
    main(options(tmp_path, pipeline_dir, transformer_path=tmp_path / "tuned"))
    build_pipeline(num_layers=3, seed=2).transformer.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"\(transformer_path\)"):
        main(options(tmp_path, pipeline_dir, transformer_path=tmp_path / "tuned"))


def test_other_files_beside_a_lora_do_not_count(tmp_path: Path, pipeline_dir: Path) -> None:
    transformer = build_pipeline(num_layers=3).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(transformer)
    WanPipeline.save_lora_weights(tmp_path / "run", transformer_lora_layers=layers)
    write_prompts(tmp_path)
    main(options(tmp_path, pipeline_dir, lora_path=tmp_path / "run"))
    (tmp_path / "run" / "events.out.tfevents").write_text("more")
    main(options(tmp_path, pipeline_dir, lora_path=tmp_path / "run"))
    WanPipeline.save_lora_weights(tmp_path / "run", transformer_lora_layers=layers)
    with pytest.raises(ValueError, match=r"\(lora_path\)"):
        main(options(tmp_path, pipeline_dir, lora_path=tmp_path / "run"))


def test_image_to_video(tmp_path: Path, i2v_pipeline_dir: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, size=(50, 70, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    prompts = [{"caption": "a red circle", "image_id": "x", "image_path": "a.png", "seed": 1}]
    write_prompts(tmp_path, prompts)
    main(options(tmp_path, i2v_pipeline_dir))
    assert (tmp_path / "out" / "x_seed_1.mp4").is_file()

    write_prompts(tmp_path, [{**prompts[0], "last_image": "a.png"}])
    with pytest.raises(ValueError, match="takes only a first image"):
        main(options(tmp_path, i2v_pipeline_dir))
    write_prompts(tmp_path, [{"caption": "a red circle"}])
    with pytest.raises(ValueError, match="`image` is missing"):
        main(options(tmp_path, i2v_pipeline_dir))


def test_options_of_the_sampling(tmp_path: Path, pipeline_dir: Path) -> None:
    """They are in the record of a video, and a video depends on them."""
    write_prompts(tmp_path, PROMPTS[:1])
    main(options(tmp_path, pipeline_dir))
    main(options(tmp_path, pipeline_dir, output_dir=tmp_path / "b", sample_solver="euler", negative_prompt="wan"))
    plain, other = (read_record(tmp_path / folder / "red_seed_0.mp4") for folder in ("out", "b"))
    # By the sha256 of what Wan's repository has at 9737cba.
    text = other["negative_prompt"]
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    )
    assert other == {**plain, "sample_solver": "euler", "negative_prompt": text}
    with pytest.raises(ValueError, match=r"made with other settings \(sample_solver\)"):
        main(options(tmp_path, pipeline_dir, output_dir=tmp_path / "b", negative_prompt=text))
    main(options(tmp_path, pipeline_dir, output_dir=tmp_path / "b", negative_prompt=text, sample_solver="euler"))


def test_random_seed(tmp_path: Path, pipeline_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path)
    main([*options(tmp_path, pipeline_dir), "--random_seed"])
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())
    seed = rows[0]["seed"]
    assert [row["seed"] for row in rows] == [seed, 9, seed]
    main([*options(tmp_path, pipeline_dir, output_dir=tmp_path / "other"), "--random_seed"])
    assert json.loads((tmp_path / "other" / "manifest.json").read_text())[0]["seed"] != seed

    # The same command goes on, and the options that it left behind make the same videos somewhere else.
    (tmp_path / "out" / f"red_seed_{seed}.mp4").unlink()
    capsys.readouterr()
    main([*options(tmp_path, pipeline_dir), "--random_seed"])
    assert "1 videos generated, 2 were there" in capsys.readouterr().out
    main(["--config", str(tmp_path / "out" / "generate.yaml"), f"--output_dir={tmp_path / 'again'}"])
    for path in (tmp_path / "out").glob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    main(options(tmp_path, pipeline_dir, output_dir=tmp_path / "zero"))
    with pytest.raises(
        ValueError, match=r"`random_seed`: .*zero/generate\.yaml is from a run with the default seed 0"
    ):
        main([*options(tmp_path, pipeline_dir, output_dir=tmp_path / "zero"), "--random_seed"])


def test_a_seed_that_was_drawn_is_not_replaced_by_the_default(tmp_path: Path, pipeline_dir: Path) -> None:
    write_prompts(tmp_path)
    output_dir = tmp_path / "videos"
    output_dir.mkdir()
    (output_dir / "generate.yaml").write_text(
        "prompts: x\npretrained_model_name_or_path: x\noutput_dir: x\nseed: 77\n"
    )
    with pytest.raises(ValueError, match=r"from a run with the seed 77\. Give `--seed 77`, or `--random_seed`"):
        main(options(tmp_path, pipeline_dir, output_dir=output_dir))
    assert [path.name for path in output_dir.iterdir()] == ["generate.yaml"]


def test_a_damaged_video_is_called_damaged(tmp_path: Path, pipeline_dir: Path) -> None:
    write_prompts(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "red_seed_0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be read, or is not a video of `generate`"):
        main(options(tmp_path, pipeline_dir))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipeline", r"`transformer_path` '.*' is a whole pipeline\. Give its transformer, '.*transformer'"),
        ("native", r"is not a transformer in diffusers' format\. `hy-prfl convert --transformer"),
        ("empty", r"`transformer_path`: there is no config\.json in"),
    ],
)
def test_folders_that_are_no_transformer(tmp_path: Path, pipeline_dir: Path, name: str, message: str) -> None:
    write_prompts(tmp_path)
    folder = pipeline_dir if name == "pipeline" else tmp_path / name
    folder.mkdir(exist_ok=True)
    if name == "native":
        (folder / "config.json").write_text('{"model_type": "t2v", "dim": 24}')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([*options(tmp_path, pipeline_dir), "--transformer_path", str(folder)])


def test_several_loras(tmp_path: Path, pipeline_dir: Path) -> None:
    write_prompts(tmp_path, PROMPTS[:1])
    for seed, name in enumerate("ab"):
        transformer = build_pipeline(num_layers=3).transformer
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
        WanPipeline.save_lora_weights(tmp_path / name, transformer_lora_layers=get_peft_model_state_dict(transformer))
    loras = ["--lora_path", str(tmp_path / "a"), str(tmp_path / "b")]
    weights = ["--lora_weights", "1.0", "0.5"]
    main([*options(tmp_path, pipeline_dir), *loras, *weights])
    main([*options(tmp_path, pipeline_dir), *loras, *weights])
    record = read_record(tmp_path / "out" / "red_seed_0.mp4")
    assert (len(record["lora_path"]), record["lora_weights"]) == (2, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"\(lora_path\)"):
        main([*options(tmp_path, pipeline_dir), "--lora_path", *loras[:0:-1], *weights])
    with pytest.raises(FileNotFoundError, match="`lora_path`: there is no file or folder './no/such'"):
        main([*options(tmp_path, pipeline_dir), *loras, "./no/such", *weights, "1"])


class TestBadInput:
    """Everything here must be refused before a model is loaded: the folder has no weights."""

    @pytest.fixture
    def empty_pipeline_dir(self, tmp_path: Path, pipeline_dir: Path) -> Path:
        folder = tmp_path / "pipeline"
        (folder / "transformer").mkdir(parents=True)
        for name in ("model_index.json", "transformer/config.json"):
            (folder / name).write_bytes((pipeline_dir / name).read_bytes())
        return folder

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([{"caption": ""}], "`caption` is missing"),
            ([{"caption": "a", "height": 3}], "unknown fields: height"),
            ([{"caption": "a", "image": "none.png"}], "text-to-video and takes none"),
            ({"a": 1}, "expected a JSON list"),
        ],
    )
    def test_prompts(self, tmp_path: Path, empty_pipeline_dir: Path, prompts: Any, message: str) -> None:
        write_prompts(tmp_path, prompts)
        with pytest.raises(ValueError, match=message):
            main(options(tmp_path, empty_pipeline_dir))
        assert not (tmp_path / "out").exists()

    def test_no_lora(self, tmp_path: Path, empty_pipeline_dir: Path) -> None:
        write_prompts(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"lora_path.*no/such/lora"):
            main(options(tmp_path, empty_pipeline_dir, lora_path="no/such/lora"))

    def test_no_prompts(self, tmp_path: Path, empty_pipeline_dir: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"prompts\.json"):
            main(options(tmp_path, empty_pipeline_dir))

    def test_another_pipeline(self, tmp_path: Path, empty_pipeline_dir: Path) -> None:
        write_prompts(tmp_path)
        (empty_pipeline_dir / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        with pytest.raises(ValueError, match="FluxPipeline"):
            main(options(tmp_path, empty_pipeline_dir))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("height", 30),
            ("width", 0),
            ("num_frames", 6),
            ("num_inference_steps", 0),
            ("flow_shift", 0),
            ("guidance_scale", -1),
            ("guidance_scale", "nan"),
            ("crf", 52),
            ("seed", -1),
            ("lora_scale", 0.5),
            ("step_cache", "teacache"),
            ("step_cache_threshold", 0.1),
            ("step_cache_interval", 3),
            ("cpu_offload", "disk"),
            ("context_parallel_degree", 0),
            ("context_parallel_degree", 2),
            ("shard_weights", "transformer"),
            ("shard_weights", "vae"),
            ("lora_weights", 0.5),
            ("lora_2_weights", 0.5),
            ("sample_solver", "ddim"),
            ("image_fit", "area"),
            ("image_fit", "pad"),
            ("heigth", 32),
        ],
    )
    def test_options(self, tmp_path: Path, empty_pipeline_dir: Path, name: str, value: Any) -> None:
        write_prompts(tmp_path)
        with pytest.raises(ValueError, match=name):
            main(options(tmp_path, empty_pipeline_dir, **{name: value}))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"seed": 1, "random_seed": "true"}, "`seed` must be left out with `random_seed`"),
            (
                {"lora_path": "a", "lora_weights": 1, "lora_scale": 1},
                "`lora_scale` must be left out with `lora_weights`",
            ),
            ({"lora_path": "a", "lora_2_weights": 1}, "`lora_2_weights` must be a number for each of the 0 LoRAs"),
            ({"context_parallel_degree": 2, "step_cache": "sea"}, "`step_cache` must be none"),
            ({"context_parallel_degree": 4, "ring_degree": 3}, "`ring_degree` must be a divisor of .* 4, got 3"),
            (
                {"context_parallel_degree": 2, "ring_degree": 2},
                "`attention_backend` must be with `ring_degree` one of",
            ),
            (
                {"context_parallel_degree": 2, "ring_degree": 2, "attention_backend": "native"},
                "`attention_backend` must be with `ring_degree` one of .*, got 'native'",
            ),
            (
                {"context_parallel_degree": 2, "shard_weights": "transformer", "cpu_offload": "model"},
                "`cpu_offload` must be none with `shard_weights`",
            ),
            (
                {"context_parallel_degree": 2, "shard_weights": "text_encoder", "text_encoder_on_cpu": "true"},
                "`shard_weights` must be without text_encoder",
            ),
            ({"text_encoder_on_cpu": "true", "cpu_offload": "model"}, "`text_encoder_on_cpu` must be left out"),
        ],
    )
    def test_options_that_do_not_go_together(
        self, tmp_path: Path, empty_pipeline_dir: Path, values: dict[str, Any], message: str
    ) -> None:
        write_prompts(tmp_path)
        with pytest.raises(ValueError, match=message):
            main(options(tmp_path, empty_pipeline_dir, **values))
        assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_launch_with_any_number_of_processes(
    tmp_path: Path, pipeline_dir: Path, accelerate_launch: Callable[..., str]
) -> None:
    write_prompts(tmp_path)
    for num_processes in (1, 2):
        arguments = options(tmp_path, pipeline_dir, output_dir=tmp_path / f"out{num_processes}")
        accelerate_launch("generate", *arguments, num_processes=num_processes)
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert len(names) == 5
    assert names == sorted(path.name for path in (tmp_path / "out2").iterdir())
    for name in names:
        if name != "generate.yaml":
            assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes(), name
