"""LoRA beside a quantised base, and quantised frozen models, in both trainers."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.formats.layout import LORA_FILES
from hy_prfl.formats.lora_metadata import read_lora_metadata
from hy_prfl.hub.files import run_files
from hy_prfl.hub.model_card import write_model_card
from hy_prfl.models.loading import load_transformer
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.quantization import Quantizer, dequantized, is_quantized
from hy_prfl.runtime.sharding import full_state_dict
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


Build = Callable[..., PRFLTrainer]
LORA = {"lora_rank": 2, "learning_rate": 1e-2}


@pytest.fixture
def build(prfl_builder: Callable[..., Build], pipeline_dir: Path) -> Build:
    return prfl_builder(pipeline_dir)


def write_rounded(pipeline_dir: Path, folder: Path, kind: Any, *subfolders: str) -> Path:
    """A copy of a pipeline whose transformers hold, in float32, the numbers that their quantised weights stand for."""
    shutil.copytree(pipeline_dir, folder)
    for subfolder in subfolders:
        quantizer = Quantizer(kind, device=torch.device("cpu"), dtype=torch.float32)
        quantized = load_transformer(str(pipeline_dir), subfolder=subfolder, quantizer=quantizer)
        transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder=subfolder)
        transformer.load_state_dict({name: dequantized(value) for name, value in quantized.named_parameters()})
        transformer.save_pretrained(folder / subfolder)
    return folder


def lora_weights(trainer: PRFLTrainer) -> dict[str, torch.Tensor]:
    return load_file(Path(trainer.config.output_dir) / LORA_FILES["high_noise"])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_training_is_that_on_the_rounded_weights(build: Build, pipeline_dir: Path, tmp_path: Path, kind: str) -> None:
    """Both losses, activation checkpointing and AdamW, against the same updates beside whole weights of the same values."""
    rounded = write_rounded(pipeline_dir, tmp_path / "rounded", kind, "transformer")
    found = build(**LORA, base_quantization=kind, gradient_checkpointing=True, adam_epsilon=1e-4)
    found.train()
    exact = build(
        **LORA, pretrained_model_name_or_path=str(rounded), output_dir=str(tmp_path / "exact"), adam_epsilon=1e-4
    )
    exact.train()
    assert_close(lora_weights(found), lora_weights(exact))
    assert sum(map(is_quantized, found.unwrapped.parameters())) > 0


def test_quantised_reward_model_gives_the_gradient_of_its_rounded_weights(build: Build, tmp_path: Path) -> None:
    found = build(**LORA, reward_model_quantization="int8", update_schedule="reward", adam_epsilon=1e-4)
    rounded = WanRewardModel.from_pretrained(found.config.reward_model)
    rounded.load_state_dict({name: dequantized(value) for name, value in found.reward.models[0].named_parameters()})
    rounded.save_pretrained(tmp_path / "rounded")
    found.train()
    options = {"reward_model": str(tmp_path / "rounded"), "output_dir": str(tmp_path / "exact")}
    exact = build(**LORA, **options, update_schedule="reward", adam_epsilon=1e-4)
    exact.train()
    assert_close(lora_weights(found), lora_weights(exact))


def test_resuming_equals_never_having_stopped(build: Build, tmp_path: Path) -> None:
    """With an average of the adapter; checkpoints hold the adapter only."""
    options = {**LORA, "base_quantization": "int8", "use_ema": True, "max_train_steps": 3, "checkpointing_steps": 2}
    whole = build(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    largest = max(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert largest < 40_000, "no base weights"
    rest = build(**options, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(checkpoint))
    rest.train()
    found, expected = lora_weights(rest), lora_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_file_and_card_say_what_it_was_trained_beside(build: Build, tmp_path: Path) -> None:
    build(**LORA, base_quantization="int8", max_train_steps=1).train()
    file = tmp_path / "out" / LORA_FILES["high_noise"]
    assert read_lora_metadata(file)["base_quantization"] == "int8"
    write_model_card(run_files(tmp_path / "out"), tmp_path, repo_id="someone/lora")
    assert "trained on a frozen base in `int8`" in (tmp_path / "README.md").read_text()
    # Of the file alone too.
    write_model_card({file.name: file}, tmp_path, repo_id="someone/lora")
    assert "trained on a frozen base in `int8`" in (tmp_path / "README.md").read_text()


def test_both_experts_and_a_frozen_one(
    prfl_builder: Callable[..., Build], expert_pipeline_dir: Path, tmp_path: Path
) -> None:
    make = partial(prfl_builder(expert_pipeline_dir, "transformer_2"), num_inference_steps=6, adam_epsilon=1e-4)
    both = make(**LORA, expert="both", base_quantization="int8")
    both.train()
    rounded = write_rounded(expert_pipeline_dir, tmp_path / "rounded", "int8", "transformer", "transformer_2")
    path = {"pretrained_model_name_or_path": str(rounded)}
    exact = make(**LORA, **path, expert="both", output_dir=str(tmp_path / "exact"))
    exact.train()
    for file in LORA_FILES.values():
        assert_close(load_file(tmp_path / "out" / file), load_file(tmp_path / "exact" / file))
    # All weights of the one train beside the other, which is quantised.
    low = make(expert="low_noise", frozen_expert_quantization="int8", output_dir=str(tmp_path / "low"))
    assert any(map(is_quantized, low.frozen["high_noise"].parameters()))
    assert not any(map(is_quantized, low.unwrapped.parameters()))
    low.train()


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_reward_model_is_saved_as_it_was_trained(
    pipeline_dir: Path, write_latents: Callable[..., Path], tmp_path: Path, loss: str
) -> None:
    """The rounded base with the adapter in it: it gives the logits that the model in training gives."""
    write_latents(tmp_path / "train", 8)
    config = RewardTrainingConfig(
        output_dir=str(tmp_path / "out"), pretrained_model_name_or_path=str(pipeline_dir),
        train_dataset=str(tmp_path / "train"), validation_dataset=str(tmp_path / "train"), num_layers=2,
        train_batch_size=2, max_train_steps=2, learning_rate=1e-2, lora_rank=2, base_quantization="int8",
        gradient_checkpointing=True, loss=loss, report_to=["none"],
    )  # fmt: skip
    trainer = RewardTrainer.from_config(config)
    before = {name: value.clone() for name, value in full_state_dict(trainer.accelerator, trainer.unwrapped).items()}
    trainer.train()
    after = full_state_dict(trainer.accelerator, trainer.unwrapped)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".lora_B." in name} <= moved
    assert all(".lora_" in name or name.startswith(("pooler.", "head.")) for name in moved)
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 16, 2, 4, 4, generator=generator),
        torch.tensor([900.0, 300.0]),
        torch.randn(2, 16, 32, generator=generator),
    )
    with torch.no_grad():
        expected = trainer.unwrapped.eval()(*inputs).logits
        found = WanRewardModel.from_pretrained(tmp_path / "out" / "reward_model").eval()(*inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_quantization": "int8"}, "`base_quantization` must be left out without `lora_rank`"),
        ({"frozen_expert_quantization": "int8"}, "must be left out unless `expert` is high_noise or low_noise"),
        (
            {"reward_model_quantization": "int8", "shard_reward_model": True},
            "`reward_model_quantization` must be left out with `shard_reward_model`",
        ),
        (
            {"reward_model_quantization": "int8", "offload_reward_model": True},
            "`reward_model_quantization` must be left out with `offload_reward_model`",
        ),
        ({**LORA, "base_quantization": "nf4"}, "nf4 needs a CUDA GPU"),
        ({"reward_model_quantization": "nf4"}, "`reward_model_quantization` must be int8 or float8 on cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
