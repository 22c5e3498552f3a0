"""Runs that start from a transformer and from LoRAs: what the first step computes with, and what a checkpoint refuses."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.formats.layout import EXPERT_FOLDERS, LORA_FILES
from hy_prfl.formats.lora_metadata import lora_header, lora_metadata
from hy_prfl.models.conversion import read_transformer, save_native
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer
from tests.formats.native_layout import run


TARGETS = ["attn1.to_q", "ffn.net.2"]
LORA = {"lora_rank": 2, "lora_alpha": 6.0, "lora_target_modules": TARGETS}


def write_lora(file: Path, *, blocks: int = 3, seed: int = 0, expert: str | None = None) -> Path:
    """A LoRA of rank 2 and alpha 6 for some layers of each block, as training writes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for block in range(blocks):
        for target, (outputs, inputs) in zip(TARGETS, ((24, 24), (24, 32)), strict=True):
            key = f"transformer.blocks.{block}.{target}"
            weights[f"{key}.lora_A.weight"] = 0.3 * torch.randn(2, inputs, generator=generator)
            weights[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outputs, 2, generator=generator)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS).to_dict()
    metadata = lora_metadata(base_model="Wan-AI/tiny", step=1, expert=expert)  # type: ignore[arg-type]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata=lora_header(config, metadata))
    return file


def with_lora(transformer: WanTransformer3DModel, file: Path) -> WanTransformer3DModel:
    """The transformer with the LoRA added, by the formula."""
    state_dict, lora = transformer.state_dict(), load_file(file)
    for key in lora:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up, down = lora[key.replace("lora_A", "lora_B")], lora[key]
            state_dict[f"{name}.weight"] = state_dict[f"{name}.weight"] + 6 / 2 * up @ down
    transformer.load_state_dict(state_dict)
    return transformer


@pytest.fixture
def other(tmp_path: Path, pipeline_dir: Path) -> Path:
    """Folder of a transformer of the pipeline's kind with other weights."""
    torch.manual_seed(7)
    config = WanTransformer3DModel.load_config(pipeline_dir, subfolder="transformer")
    WanTransformer3DModel.from_config(config).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def build(prfl_builder: Callable[..., Any], pipeline_dir: Path) -> Callable[..., PRFLTrainer]:
    return prfl_builder(pipeline_dir)


def outputs_of(trainer: PRFLTrainer) -> torch.Tensor:
    return run(trainer.unwrapped.eval())


class TestPRFL:
    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("tuning", [{}, LORA])
    def test_another_transformer(
        self, build: Callable[..., PRFLTrainer], tmp_path: Path, other: Path, native: bool, tuning: dict[str, Any]
    ) -> None:
        expected = run(WanTransformer3DModel.from_pretrained(other).eval())
        if native:
            save_native(read_transformer(other), tmp_path / "native")
        trainer = build(transformer_path=str(tmp_path / "native" if native else other), **tuning)
        torch.testing.assert_close(outputs_of(trainer), expected)
        trainer.train()

    def test_a_lora_that_trains_on(
        self, build: Callable[..., PRFLTrainer], tmp_path: Path, pipeline_dir: Path
    ) -> None:
        lora = write_lora(tmp_path / "lora.safetensors")
        trainer = build(lora_path=str(lora), lora_start="continue", max_train_steps=1, **LORA)
        base = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").eval()
        torch.testing.assert_close(outputs_of(trainer), run(with_lora(base, lora)), rtol=1e-4, atol=1e-5)
        start = load_file(lora)
        trainer.save_model(tmp_path)
        written = load_file(tmp_path / LORA_FILES["high_noise"])
        assert set(written) == set(start)
        assert all(torch.equal(written[key], tensor) for key, tensor in start.items())
        trainer.train()
        trained = load_file(tmp_path / "out" / LORA_FILES["high_noise"])
        assert not any(torch.equal(trained[key], tensor) for key, tensor in start.items())

    @pytest.mark.parametrize("tuning", [{}, {"lora_rank": 4}])
    def test_a_lora_that_is_merged(
        self,
        build: Callable[..., PRFLTrainer],
        tmp_path: Path,
        other: Path,
        tuning: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        lora = write_lora(tmp_path / "lora.safetensors")
        trainer = build(transformer_path=str(other), lora_path=str(lora), lora_start="merge", **tuning)
        expected = with_lora(WanTransformer3DModel.from_pretrained(other).eval(), lora)
        torch.testing.assert_close(outputs_of(trainer), run(expected), rtol=1e-4, atol=1e-5)
        assert ("will fit the transformer that the run starts from" in caplog.text) == bool(tuning)
        names = [name for name, value in trainer.unwrapped.named_parameters() if value.requires_grad]
        assert all("lora_" in name for name in names) == bool(tuning)
        trainer.train()

    @pytest.mark.parametrize(
        "options",
        [{"lora_start": "continue", **LORA}, {"lora_start": "merge", "lora_rank": 4}, {"lora_start": "merge"}],
    )
    def test_resuming_equals_never_having_stopped(
        self, build: Callable[..., PRFLTrainer], tmp_path: Path, other: Path, options: dict[str, Any]
    ) -> None:
        lora = write_lora(tmp_path / "run" / LORA_FILES["high_noise"])
        options = options | {"transformer_path": str(other), "lora_path": str(lora.parent)}
        whole = build(max_train_steps=3, output_dir=str(tmp_path / "whole"), **options)
        whole.train()
        build(max_train_steps=1, **options).train()
        # The run that the LoRA is of goes on.
        (lora.parent / "metrics.jsonl").touch()
        second = build(max_train_steps=3, resume_from_checkpoint="latest", **options)
        second.train()
        expected = dict(whole.unwrapped.named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in second.unwrapped.named_parameters())

        # Other files at the same place, and another place.
        os.utime(lora, (1, 1))
        with pytest.raises(ValueError, match=r"`lora_path`: the files of '.*weights\.safetensors' have changed since"):
            build(max_train_steps=4, resume_from_checkpoint="latest", **options)
        moved = shutil.copy(lora, tmp_path / "moved.safetensors")
        with pytest.raises(ValueError, match="`lora_path` must be .*, as before the checkpoint, got .*moved"):
            build(max_train_steps=4, resume_from_checkpoint="latest", **(options | {"lora_path": str(moved)}))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_rank": 3}, "`lora_rank` must be 2, as that of 'blocks.0.attn1.to_q' in `lora_path`"),
            ({"lora_alpha": 2.0}, "`lora_alpha` must be 6, as that of 'blocks.0.attn1.to_q' in `lora_path`"),
            (
                {"lora_target_modules": ["attn1.to_q"]},
                "has layers that `lora_target_modules` does not select: blocks.0.ffn",
            ),
            (
                {"lora_target_modules": [*TARGETS, "to_k"]},
                "lacks layers that `lora_target_modules` selects: blocks.0.attn1",
            ),
        ],
    )
    def test_a_lora_of_other_options_does_not_train_on(
        self, build: Callable[..., PRFLTrainer], tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        lora = write_lora(tmp_path / "lora.safetensors")
        with pytest.raises(ValueError, match=message):
            build(lora_path=str(lora), lora_start="continue", **(LORA | options))

    def test_what_does_not_fit(
        self, build: Callable[..., PRFLTrainer], tmp_path: Path, i2v_pipeline_dir: Path
    ) -> None:
        with pytest.raises(ValueError, match="`transformer_path`: .* `in_channels` 36 against 16.*Give the pipeline"):
            build(transformer_path=str(i2v_pipeline_dir / "transformer"))
        lora = write_lora(tmp_path / "lora.safetensors", blocks=5)
        with pytest.raises(ValueError, match=r"`lora_path` .*tensors have no place in the model.*blocks\.3"):
            build(lora_path=str(lora), lora_start="merge")
        with pytest.raises(
            ValueError, match="`lora_2_path` must be left out, the run does not use the low_noise expert"
        ):
            build(lora_2_path=str(lora), lora_start="merge")


class TestExperts:
    def test_both_of_a_folder(
        self, prfl_builder: Callable[..., Any], tmp_path: Path, expert_pipeline_dir: Path
    ) -> None:
        """Of the expert in training the LoRA trains on, that of the other one is merged."""
        build = prfl_builder(expert_pipeline_dir, "transformer_2")
        folder = tmp_path / "loras"
        files = {
            expert: write_lora(folder / name, seed=len(expert), expert=expert) for expert, name in LORA_FILES.items()
        }
        bases = {
            expert: WanTransformer3DModel.from_pretrained(expert_pipeline_dir, subfolder=name).eval()
            for expert, name in EXPERT_FOLDERS.items()
        }
        expected = {expert: run(with_lora(bases[expert], files[expert])) for expert in files}
        paths = {"lora_path": str(folder), "lora_2_path": str(folder), "lora_start": "continue", **LORA}
        trainer = build(expert="low_noise", **paths)
        torch.testing.assert_close(run(trainer.unwrapped.eval()), expected["low_noise"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(trainer.frozen["high_noise"]), expected["high_noise"], rtol=1e-4, atol=1e-5)
        both = build(expert="both", output_dir=str(tmp_path / "both"), max_train_steps=1, **paths)
        for expert, transformer in both.experts.parts(both.unwrapped).items():
            torch.testing.assert_close(run(transformer.eval()), expected[expert], rtol=1e-4, atol=1e-5)
        both.train()
        swapped = {"lora_path": str(files["low_noise"]), "lora_start": "merge"}
        with pytest.raises(
            ValueError, match="`lora_path`: .* one LoRA for the high_noise expert: .* is for low_noise"
        ):
            build(expert="both", output_dir=str(tmp_path / "swapped"), **swapped)


class TestReward:
    @pytest.fixture
    def build(
        self, tmp_path: Path, write_latents: Callable[..., Path], reward_builder: Callable[..., RewardTrainer]
    ) -> Callable[..., RewardTrainer]:
        write_latents(tmp_path / "train", 4)
        return partial(reward_builder, max_train_steps=1)

    def check(self, trainer: RewardTrainer, transformer: WanTransformer3DModel) -> None:
        """The blocks are those of the transformer; pooling and head are the trainer's own."""
        model = WanRewardModel.from_transformer(transformer, num_layers=2).eval()
        for part in ("pooler", "head"):
            model.get_submodule(part).load_state_dict(trainer.unwrapped.get_submodule(part).state_dict())
        inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([300.0, 900.0]), torch.randn(2, 3, 32)
        with torch.no_grad():
            expected = model(*inputs).logits
            torch.testing.assert_close(trainer.unwrapped.eval()(*inputs).logits, expected, rtol=1e-4, atol=1e-5)

    def test_blocks_of_a_merged_transformer(
        self, build: Callable[..., RewardTrainer], tmp_path: Path, other: Path
    ) -> None:
        """The LoRA of a whole generator: what it has for blocks beyond those of the reward model is not needed."""
        lora = write_lora(tmp_path / "lora.safetensors")
        trainer = build(transformer_path=str(other), lora_path=str(lora), lora_start="merge")
        self.check(trainer, with_lora(WanTransformer3DModel.from_pretrained(other), lora))
        trainer.train()

    def test_a_lora_that_trains_on(
        self, build: Callable[..., RewardTrainer], tmp_path: Path, pipeline_dir: Path
    ) -> None:
        lora = write_lora(tmp_path / "lora.safetensors", blocks=2)
        trainer = build(lora_path=str(lora), lora_start="continue", **LORA)
        base = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
        self.check(trainer, with_lora(base, lora))
        trainer.train()
        write_lora(tmp_path / "lora.safetensors", blocks=3)
        with pytest.raises(ValueError, match=r"has layers that `lora_target_modules` does not select: blocks\.2"):
            build(output_dir=str(tmp_path / "new"), lora_path=str(lora), lora_start="continue", **LORA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_path": "x"}, "`lora_start` must be continue or merge with `lora_path`"),
        ({"lora_start": "merge"}, "`lora_start` must be left out without `lora_path`"),
        ({"lora_path": "x", "lora_start": "continue"}, "`lora_rank` must be given to continue a LoRA"),
        ({"transformer_path": "x", "reward_model": "y"}, "`transformer_path` must be left out with `reward_model`"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardTrainingConfig(output_dir="o", pretrained_model_name_or_path="p", train_dataset="d", **options)
