import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from examples.shapes.pipeline import build_pipeline
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.hub.files import run_files
from hy_prfl.hub.model_card import (
    OWN_CARD,
    build_card,
    draw_training,
    experts_of,
    may_replace_card,
    model_kind,
    usage,
    write_model_card,
)
from hy_prfl.models.experts import LORA_FILES
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer
from tests.hub.hub_server import HubServer, check_card, running_hub, use_in_this_process


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        use_in_this_process(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def train(
    tmp_path: Path, pipeline_dir: Path, tiny_vae: str, write_latents: Callable[..., Path]
) -> Callable[..., Path]:
    """Function that makes a run of two steps and two validations: `train(RewardTrainer, **options)` -> its folder."""

    def run(trainer: type[RewardTrainer] | type[PRFLTrainer], **options: Any) -> Path:
        write_latents(tmp_path / "train", 6)
        write_latents(tmp_path / "validation", 4, seed=1)
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "pretrained_model_name_or_path": str(pipeline_dir),
            "train_dataset": str(tmp_path / "train"),
            "validation_dataset": str(tmp_path / "validation"),
            "validation_timesteps": [200, 900],
            "validation_steps": 1,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "report_to": ["none"],
        }
        if trainer is RewardTrainer:
            RewardTrainer(RewardTrainingConfig(**values, num_layers=2, **options)).train()
        else:
            transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
            reward_model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint=tiny_vae)
            reward_model.save_pretrained(tmp_path / "reward")
            values |= {"reward_model": str(tmp_path / "reward"), "num_inference_steps": 3}
            PRFLTrainer(PRFLTrainingConfig(**values, **options)).train()
        return tmp_path / "out"

    return run


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def run_usage(card: ModelCard, **names: Any) -> dict[str, Any]:
    """Do what the card says, and return the names that its code defines."""
    code = re.search(r"```python\n(.*?)\n```", section(card.text, "Use"), re.DOTALL)
    assert code is not None
    exec(code[1], names)
    return names


def check_evaluation(card: ModelCard, metrics: dict[str, float]) -> None:
    """Every metric of the run, at every noise level, is a result in the card's `model-index`."""
    results = {
        (result.metric_type, (result.dataset_args or {}).get("timestep")): result.metric_value
        for result in card.data.eval_results
    }
    expected = {}
    for name, value in metrics.items():
        if name != "global_step":
            metric, _, timestep = name.partition("/t")
            expected[metric, int(timestep) if timestep else None] = value
    assert results.keys() == expected.keys()
    assert {timestep for _, timestep in results} == {None, 200, 900}
    for key, value in expected.items():
        assert results[key] == pytest.approx(value, abs=1e-6)
    sigmas = {result.dataset_args["sigma"] for result in card.data.eval_results if result.dataset_args}
    assert sigmas == {0.2, 0.9}


def check_common(card: ModelCard, run_dir: Path, directory: Path) -> None:
    assert check_card(card.content) == ([], [])
    card.validate(repo_type="model")
    assert metadata_load(directory / "README.md")["library_name"] == "diffusers"
    assert card.data.license == "apache-2.0"
    shown = re.search(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)
    assert shown is not None
    assert yaml.safe_load(shown[1]) == yaml.safe_load((run_dir / "config.yaml").read_text())
    assert "arXiv:2511.21541" in section(card.text, "Citation")
    pixels = np.asarray(Image.open(directory / "training.png").convert("L"))
    assert pixels.std() > 5
    assert "(training.png)" in card.text


def test_reward_model(hub: HubServer, train: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train(RewardTrainer)
    files = run_files(run_dir)
    written = write_model_card(files, tmp_path, repo_id=str(run_dir / "best"))
    assert written == ["README.md", "training.png"]
    card = ModelCard.load(tmp_path / "README.md")
    check_common(card, run_dir, tmp_path)
    metrics = json.loads((run_dir / "best" / "metrics.json").read_text())
    check_evaluation(card, metrics)
    assert card.data.pipeline_tag == "video-classification"
    row = next(line for line in section(card.text, "Evaluation").splitlines() if line.startswith("| accuracy"))
    assert [float(cell) for cell in row.split("|")[2:5]] == pytest.approx(
        [metrics["accuracy/t200"], metrics["accuracy/t900"], metrics["accuracy"]], abs=5e-4
    )
    assert "`motion_quality`" in card.text

    latents, prompt_embeds = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 5, 32)
    names = run_usage(card, noisy_latents=latents, timesteps=torch.tensor([100.0, 700.0]), prompt_embeds=prompt_embeds)
    assert names["logits"].shape == (2,)
    saved = load_file(run_dir / "best" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in names["reward_model"].state_dict().items())


def test_adapter(hub: HubServer, train: Callable[..., Path], pipeline_dir: Path) -> None:
    run_dir = train(PRFLTrainer, lora_rank=2)
    write_model_card(run_files(run_dir), run_dir, repo_id=str(run_dir))
    card = ModelCard.load(run_dir / "README.md")
    check_common(card, run_dir, run_dir)
    validations = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in validations if any("validation/" in name for name in line)][-1]
    prefix = "validation/"
    check_evaluation(card, {n.removeprefix(prefix): v for n, v in last.items() if n.startswith(prefix)})
    assert card.data.pipeline_tag == "text-to-video"
    assert "lora" in card.data.tags

    transformer = run_usage(card)["pipeline"].transformer
    saved = load_file(run_dir / "pytorch_lora_weights.safetensors")
    loaded = {name: value for name, value in transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(saved)
    for name, value in loaded.items():
        key = "transformer." + re.sub(r"\.default(_\d+)?\.", ".", name)
        assert torch.equal(saved[key], value), name


def test_transformer(hub: HubServer, train: Callable[..., Path]) -> None:
    run_dir = train(PRFLTrainer)
    write_model_card(run_files(run_dir), run_dir, repo_id=str(run_dir))
    card = ModelCard.load(run_dir / "README.md")
    check_common(card, run_dir, run_dir)
    pipeline = run_usage(card)["pipeline"]
    assert isinstance(pipeline, WanPipeline)
    saved = load_file(run_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in pipeline.transformer.state_dict().items())


def test_names_of_the_hub_become_links_and_paths_do_not(tmp_path: Path, pipeline_dir: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path)
    files = {"config.json": tmp_path / "config.json", "config.yaml": tmp_path / "config.yaml"}
    assert model_kind(files) == "reward"

    def card_of(base: str, dataset: str) -> ModelCard:
        config = {"pretrained_model_name_or_path": base, "train_dataset": dataset, "flow_shift": 5.0}
        files["config.yaml"].write_text(yaml.safe_dump(config))
        return build_card("reward", files, repo_id="user/pavrm")

    card = card_of("Wan-AI/Wan2.1-T2V-14B-Diffusers", "user/clips")
    assert card.data.base_model == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["user/clips"]
    assert card.data.eval_results is None
    for base, dataset in [(str(pipeline_dir), "data/a/train"), ("./model", "../train"), ("/data/m", "clips")]:
        card = card_of(base, dataset)
        assert (card.data.base_model, card.data.datasets) == (None, None)
        assert check_card(card.content) == ([], [])
        assert base in card.text
        assert f"`{dataset}`" in card.text


def test_image_to_video_reward_model(tmp_path: Path, i2v_pipeline_dir: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path)
    card = build_card("reward", {"config.json": tmp_path / "config.json"}, repo_id=str(tmp_path))
    names = run_usage(
        card,
        noisy_latents=torch.randn(1, 16, 2, 4, 4),
        condition=torch.randn(1, 20, 2, 4, 4),
        timesteps=torch.tensor([500.0]),
        prompt_embeds=torch.randn(1, 5, 32),
        image_embeds=torch.randn(1, 5, 32),
    )
    assert names["logits"].shape == (1,)


def test_image_to_video_generators(tmp_path: Path, i2v_pipeline_dir: Path) -> None:
    config = tmp_path / "config.yaml"
    for base in (str(i2v_pipeline_dir), "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"):
        config.write_text(yaml.safe_dump({"pretrained_model_name_or_path": base}))
        model_config = i2v_pipeline_dir / "transformer" / "config.json"
        card = build_card(
            "transformer", {"config.yaml": config, "transformer/config.json": model_config}, repo_id="user/i2v"
        )
        assert card.data.pipeline_tag == "image-to-video"
        assert f'WanImageToVideoPipeline.from_pretrained("{base}"' in card.text


def test_metrics_that_are_not_finite_stay_out_of_the_model_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanRewardModel", "task": "blur_quality", "num_layers": 8})
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"validation_dataset": "user/clips"}))
    (tmp_path / "metrics.json").write_text('{"global_step": 3, "loss/t200": NaN, "loss/t400": 0.5}')
    files = {path.name: path for path in tmp_path.iterdir()}
    (result,) = build_card("reward", files, repo_id="user/x").data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("loss", 0.5, "user/clips")


def test_nothing_to_draw_and_nothing_to_describe(tmp_path: Path) -> None:
    assert not draw_training([{"step": 1, "validation/loss": 1.0}], {}, tmp_path / "training.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'user/x': no reward model, transformer or adapter"):
        write_model_card({"notes.txt": tmp_path / "notes.txt"}, tmp_path, repo_id="user/x")


def test_only_own_cards_are_replaced(tmp_path: Path) -> None:
    assert may_replace_card(None)
    (tmp_path / "README.md").write_text(f"# Model\n\n{OWN_CARD}\n")
    assert may_replace_card(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# Model\n")
    assert not may_replace_card(tmp_path / "README.md")


def test_a_card_loads_each_expert_into_its_place(expert_pipeline_dir: Path, tmp_path: Path) -> None:
    """What the cards of two adapters, and of the low-noise expert's transformer, say."""
    pipeline = build_pipeline(num_layers=3, boundary_ratio=0.875, seed=1)
    pipeline.transformer_2.save_pretrained(tmp_path / "transformer_2")
    files = {"transformer_2/config.json": tmp_path / "transformer_2/config.json"}
    assert model_kind(files) == "transformer"
    assert experts_of("transformer", files) == {"low_noise": "transformer_2/config.json"}
    code = usage("transformer", str(tmp_path), str(expert_pipeline_dir), image_to_video=False, experts=["low_noise"])
    names: dict[str, Any] = {}
    exec(code, names)
    tuned = names["pipeline"].transformer_2.state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in pipeline.transformer_2.state_dict().items())

    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(pipeline.transformer)
    for name in LORA_FILES.values():
        WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name=name)
    files = {name: tmp_path / name for name in LORA_FILES.values()}
    assert model_kind(files) == "lora"
    experts = list(experts_of("lora", files))
    exec(usage("lora", str(tmp_path), str(expert_pipeline_dir), image_to_video=False, experts=experts), names)
    assert set(names["pipeline"].get_list_adapters()) == {"transformer", "transformer_2"}
