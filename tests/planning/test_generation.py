import dataclasses
import json
from pathlib import Path

import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from hy_prfl.configs.generate import GenerateConfig
from hy_prfl.inference.candidate_files import candidate_settings
from hy_prfl.inference.candidate_results import Candidates
from hy_prfl.inference.candidates import sample_candidates
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.planning.generation import UMT5_XXL, plan_generation
from hy_prfl.scripts.plan import main


SIZE = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 5, "max_sequence_length": 16}


def recipe(folder: Path, **options: object) -> GenerateConfig:
    values = {"prompts": "-", "output_dir": "-", "pretrained_model_name_or_path": str(folder), "dtype": "float32"}
    return GenerateConfig(**{**values, **SIZE, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"num_candidates": 4, "keep": "1:3,3:1"},
        {"num_candidates": 3, "guidance_scale": 1.0},
        {"num_candidates": 4, "keep": "2:2", "resample": True},
    ],
)
def test_passes_and_flops_are_those_that_are_made(pipeline_dir: Path, options: dict[str, object]) -> None:
    """FLOPs counted by torch in a real run."""
    config = recipe(pipeline_dir, reward_model="-", **options)
    pipeline, reward_model = models()
    counter = FlopCounterMode(display=False)
    with counter:
        result = run(config, pipeline, reward_model)
    plan = plan_generation(config, reward_config=reward_model.config).setting
    found = (plan.forwards, plan.reward_forwards, plan.reward_backwards)
    assert found == (result.num_forwards, result.num_reward_forwards, 0)
    counts = counter.get_flop_counts()
    made = sum(sum(counts[name].values()) for name in ("WanTransformer3DModel", "WanRewardModel"))
    # Attention of 12 tokens of width 24 to themselves and to 16 of the text, which torch does not count on the CPU.
    attention = 4 * 12 * (12 + 16) * 24
    made += attention * (3 * plan.forwards + 2 * plan.reward_forwards)
    assert 1e12 * plan.teraflops == pytest.approx(made, rel=1e-3)


def test_guidance(pipeline_dir: Path) -> None:
    options = {"num_candidates": 4, "keep": "2:2", "reward_model": "-"}
    config = recipe(pipeline_dir, **options, reward_guidance=0.1, reward_guidance_steps=[2, 4])
    pipeline, reward_model = models()
    result = run(config, pipeline, reward_model)
    plan = plan_generation(config, reward_config=reward_model.config).setting
    found = (plan.forwards, plan.reward_forwards, plan.reward_backwards)
    # Four candidates at step 2, two at steps 3 and 4.
    assert found == (result.num_forwards, result.num_reward_forwards, result.num_reward_backwards)
    assert plan.reward_backwards == 4 + 2 + 2
    plain = plan_generation(recipe(pipeline_dir, **options), reward_config=reward_model.config).setting
    assert plan.teraflops > plain.teraflops
    assert plan.reward_forwards == plain.reward_forwards + 8


def models() -> tuple[WanPipeline, WanRewardModel]:
    pipeline = build_pipeline(num_layers=3)
    pipeline.set_progress_bar_config(disable=True)
    reward_model = WanRewardModel.from_transformer(pipeline.transformer, num_layers=2, num_query_heads=2)
    return pipeline, reward_model.requires_grad_(False).eval()


def run(config: GenerateConfig, pipeline: WanPipeline, reward_model: WanRewardModel) -> Candidates:
    inputs = {name: getattr(config, name) for name in (*SIZE, "guidance_scale")}
    seeds, settings = range(config.num_candidates), candidate_settings(config)
    return sample_candidates(pipeline, reward_model, seeds, settings, output_type="latent", prompt="a", **inputs)


def test_memory_of_a_published_model() -> None:
    """Weights of the 14B generator in bfloat16 take 28.6 GB, UMT5-XXL 11.4 GB."""
    config = recipe(
        Path("-"), pretrained_model_name_or_path="Wan-AI/Wan2.1-T2V-14B-Diffusers", reward_model="-", num_candidates=8
    )
    config = dataclasses.replace(config, height=480, width=832, num_frames=81, dtype="bfloat16", keep="1:4,2:1")
    whole = plan_generation(config)
    offloaded = plan_generation(dataclasses.replace(config, cpu_offload="model"))
    batched = plan_generation(dataclasses.replace(config, candidate_batch_size=4))
    assert whole.num_tokens == 21 * 30 * 52
    assert 28.5 + 11.3 < whole.plain.peak < 28.7 + 11.4 + 12
    # Eight of forty blocks, embeddings and a head more.
    assert 28.6 * 8 / 40 < whole.setting.peak - whole.plain.peak < 28.6 * 10 / 40
    assert offloaded.setting.peak < whole.setting.peak - 11
    assert batched.setting.peak > whole.setting.peak + 3
    assert whole.setting.forwards == 2 * (8 + 4 + 3)
    assert UMT5_XXL["d_model"] == 4096


def test_command(pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "generate.yaml", tmp_path / "plan.json"
    path.write_text(
        f"pretrained_model_name_or_path: {pipeline_dir}\nheight: 64\nwidth: 48\nnum_inference_steps: 10\ncrf: 3\n"
    )
    main(["--config", str(path), "--num_candidates", "4", "--keep=2:1", "--num-frames=5", "--output", str(output)])
    assert "forwards of the generator" in capsys.readouterr().out
    plan = json.loads(output.read_text())
    assert (plan["num_tokens"], plan["setting"]["forwards"], plan["plain"]["forwards"]) == (2 * 4 * 3, 2 * 16, 20)
    assert plan["fits"]
    with pytest.raises(ValueError, match="`num_gpus` must be left out"):
        main(["--config", str(path), "--num_gpus", "2"])
    with pytest.raises(ValueError, match="`step_cache` must be none"):
        main(["--config", str(path), "--step_cache", "first_block"])


def test_reward_model_on_disk_is_taken(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    path = tmp_path / "generate.yaml"
    path.write_text(f"pretrained_model_name_or_path: {pipeline_dir}\nnum_inference_steps: 4\ncrf: 3\n")
    counts = []
    for num_layers in (1, 2):
        folder = tmp_path / f"reward-{num_layers}"
        WanRewardModel.from_transformer(transformer, num_layers, num_query_heads=2).save_pretrained(folder)
        output = tmp_path / f"{num_layers}.json"
        options = ["--num_candidates", "2", "--reward_model", str(folder), "--output", str(output)]
        main(["--config", str(path), "--height=32", "--width=32", "--num_frames=5", *options])
        counts.append(json.loads(output.read_text())["setting"]["teraflops"])
    assert counts[0] < counts[1]
