"""Several reward models of a run: their gradient, what is logged of them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.formats.lora_metadata import read_lora_metadata
from hy_prfl.hub.files import run_files
from hy_prfl.hub.model_card import write_model_card
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.rollout.gradient_steps import GradientStep
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


Build = Callable[..., PRFLTrainer]


@pytest.fixture
def build(prfl_builder: Callable[..., Build], pipeline_dir: Path, tmp_path: Path, tiny_vae: str) -> Build:
    """
    Function that builds a trainer; `reward-0` to `reward-2` are reward models of one task, `physics` of another; `probe-0`
    to `probe-2` have the same blocks.
    """
    build_one = prfl_builder(pipeline_dir)
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    for seed, (name, task) in enumerate([*((f"reward-{i}", "motion_quality") for i in range(3)), ("physics",) * 2]):
        torch.manual_seed(seed)
        options = {"num_layers": 1 + seed % 2, "task": task.replace("physics", "physics_quality")}
        model = WanRewardModel.from_transformer(transformer, vae_fingerprint=tiny_vae, **options)
        # Spreads the logits, which are all close to zero before a training.
        torch.nn.init.normal_(model.head.linear_3.weight, std=1.0)
        with torch.no_grad():
            model.blocks[0].ffn.net[2].weight.add_(0.01 * (seed + 1))
        model.save_pretrained(tmp_path / name)
    probe = WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint=tiny_vae)
    for index, pooling in enumerate(["query", "query", "mean"]):
        probe.register_to_config(pooling=pooling)
        probe.reset_head()
        torch.nn.init.normal_(probe.head.linear_3.weight, std=1.0)
        probe.save_pretrained(tmp_path / f"probe-{index}")

    def build_several(names: list[str], **options: Any) -> PRFLTrainer:
        models = [str(tmp_path / name) for name in names]
        return build_one(reward_model=None, reward_models=models, **options)

    return build_several


def any_step(trainer: PRFLTrainer) -> tuple[GradientStep, Conditioning]:
    """A step to random latents, and prompts."""
    torch.manual_seed(5)
    latents, timesteps = torch.randn(2, 16, 2, 4, 4), torch.tensor([700.0, 300.0])
    conditioning = Conditioning(torch.randn(2, 16, 32))
    return GradientStep(latents, timesteps, torch.tensor(0.25), latents, lambda *_: iter(())), conditioning


def combined(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The combined logit, written out."""
    weights = torch.tensor(options.get("reward_weights", [1.0] * len(logits)))[:, None]
    form = options.get("reward_combination", "mean")
    if form == "min":
        return logits.min(dim=0).values
    if form == "product":
        product = (logits.sigmoid() ** weights).prod(dim=0)
        return (product / (1 - product)).log()
    mean = (weights * logits).sum(0) / weights.sum()
    variance = (weights * (logits - mean) ** 2).sum(0) / weights.sum()
    return mean - options.get("reward_disagreement", 0.0) * variance.sqrt()


@pytest.mark.parametrize(
    "options",
    [
        {"reward_disagreement": 0.5, "reward_weights": [1.0, 2.0, 0.5]},
        {"reward_disagreement": 0.5, "offload_reward_model": True, "reward_loss": "sigmoid"},
        {"reward_combination": "min"},
        {"reward_combination": "product", "reward_weights": [1.0, 2.0, 0.5]},
        {"reward_combination": "product", "reward_loss": "sigmoid", "gradient_checkpointing": True},
        {"reward_loss": "logit", "reward_weights": [1.0, 2.0, 0.5]},
    ],
)
@pytest.mark.parametrize(
    "names",
    [["reward-0", "reward-1", "reward-2"], ["probe-0", "probe-1", "probe-2"], ["probe-0", "reward-1", "probe-1"]],
)
def test_gradient_is_that_of_one_graph(build: Build, names: list[str], options: dict[str, Any]) -> None:
    trainer = build(names, **options)
    step, conditioning = any_step(trainer)
    found = trainer.reward.differentiate(step, conditioning)

    models = [WanRewardModel.from_pretrained(source) for source in trainer.config.reward_sources]
    leaf = step.latents.clone().requires_grad_()
    logits = torch.stack([model(leaf, step.timesteps, conditioning.prompt_embeds).logits for model in models])
    assert logits.std(dim=0).min() > 0.05
    reward = combined(logits, options)
    form = options.get("reward_loss", "logsigmoid")
    loss = {"logit": -reward, "sigmoid": 2 - reward.sigmoid(), "logsigmoid": -reward.sigmoid().log()}[form].mean()
    loss.backward()
    torch.testing.assert_close(found.model_logits, logits.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, reward.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-4, atol=1e-5)
    # Four steps of which this one is a quarter: the mean width.
    torch.testing.assert_close(found.latents_grad, leaf.grad, rtol=1e-3, atol=1e-8)


def count_calls(trainer: PRFLTrainer) -> list[int]:
    """For each reward model, forwards of one gradient; those that share blocks are called through the first."""
    calls = [0] * len(trainer.reward.models)
    for index, model in enumerate(trainer.reward.models):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        model.register_forward_hook(count)
    trainer.reward.differentiate(*any_step(trainer))
    return calls


def test_each_model_is_called_as_often_as_it_has_to_be(build: Build) -> None:
    names = ["reward-0", "reward-1", "reward-2"]
    assert count_calls(build(names, reward_disagreement=0.5)) == [2, 2, 1]
    assert count_calls(build(names, reward_combination="product")) == [1, 1, 1]
    assert count_calls(build(names[:1])) == [1]
    assert count_calls(build(["probe-0", "probe-1", "probe-2"], reward_disagreement=0.5)) == [1, 0, 0]
    assert count_calls(build(["probe-0", "reward-1", "probe-1"], reward_disagreement=0.5)) == [2, 1, 0]


@pytest.mark.parametrize(
    "options", [{}, {"offload_reward_model": True}, {"reward_model_quantization": "int8", "reward_disagreement": 0.2}]
)
def test_models_with_the_same_blocks_have_one_copy_of_them(build: Build, options: dict[str, Any]) -> None:
    trainer = build(["probe-0", "reward-1", "probe-1", "probe-2"], **options)
    models = trainer.reward.models
    assert [each.places for each in trainer.reward.passes] == [[0, 2, 3], [1]]
    assert models[0].blocks is models[2].blocks
    assert models[0].patch_embedding is models[3].patch_embedding
    assert models[0].blocks is not models[1].blocks
    assert models[0].pooler is not models[2].pooler
    # The weights of four models, but for three backbones two.
    own = [sum(each.numel() for each in model.parameters()) for model in models]
    heads = [
        sum(each.numel() for part in (model.pooler, model.head) for each in part.parameters()) for model in models
    ]
    together = sum(each.numel() for each in torch.nn.ModuleList(models).parameters())
    assert together == own[0] + own[1] + heads[2] + heads[3]
    # Each by itself, as a validation calls it.
    step, conditioning = any_step(trainer)
    found = trainer.reward.differentiate(step, conditioning)
    for model, logits in zip(models, found.model_logits, strict=True):
        with torch.no_grad(), trainer.reward.in_use(model):
            alone = trainer.reward.score(model, step.latents, step.timesteps, conditioning)
        torch.testing.assert_close(logits, alone)


def test_blocks_that_differ_in_the_last_bit_are_not_shared(build: Build, tmp_path: Path) -> None:
    other = WanRewardModel.from_pretrained(tmp_path / "probe-1")
    weight = other.blocks[1].ffn.net[2].bias
    with torch.no_grad():
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(1.0))
    other.save_pretrained(tmp_path / "other")
    trainer = build(["probe-0", "other"])
    assert [each.places for each in trainer.reward.passes] == [[0], [1]]


def test_a_run_on_several_logs_each_and_names_all(
    build: Build, tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    prompts = str(write_latents(tmp_path / "prompts", 3, prompts_only=True))
    options: dict[str, Any] = {"validation_dataset": prompts, "max_train_steps": 1, "lora_rank": 2}
    alone = [build([name], output_dir=str(tmp_path / name), **options).validate() for name in ("reward-0", "reward-1")]
    trainer = build(["reward-0", "reward-1"], reward_disagreement=0.5, output_dir=str(tmp_path / "both"), **options)
    before = trainer.validate()
    for index, metrics in enumerate(alone):
        assert before[f"reward/{index}"] == pytest.approx(metrics["reward"])
    assert before["reward_logit"] == pytest.approx(
        sum(metrics["reward_logit"] for metrics in alone) / 2 - 0.5 * before["reward_disagreement"]
    )
    trainer.train()
    train, *_ = map(json.loads, (tmp_path / "both" / "metrics.jsonl").read_text().splitlines())
    assert {"train/reward/0", "train/reward/1", "train/reward_disagreement"} <= set(train)
    header = read_lora_metadata(tmp_path / "both" / "pytorch_lora_weights.safetensors")
    assert json.loads(header["reward_models"]) == trainer.config.reward_models
    (tmp_path / "card").mkdir()
    write_model_card(run_files(tmp_path / "both"), tmp_path / "card", repo_id="me/lora")
    card = (tmp_path / "card" / "README.md").read_text()
    assert all(f"`{source}`" in card for source in trainer.config.reward_sources)
    assert "Reward models: `mean` of 2, less 0.5 standard deviations of their logits." in card


def test_several_tasks_have_their_names(build: Build) -> None:
    trainer = build(["reward-0", "physics"], reward_combination="product")
    feedback = trainer.reward.differentiate(*any_step(trainer))
    assert set(trainer.reward.metrics([feedback])) == {
        "reward", "reward_loss", "reward_logit", "reward_disagreement", "reward/motion_quality", "reward/physics_quality",
    }  # fmt: skip


def test_models_that_do_not_go_together_are_refused(
    build: Build, tmp_path: Path, i2v_pipeline_dir: Path, pipeline_dir: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"`reward_disagreement` must be 0 for reward models of several tasks, .*physics"
    ):
        build(["reward-0", "physics"], reward_disagreement=0.5)
    image = WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")
    WanRewardModel.from_transformer(image, num_layers=1).save_pretrained(tmp_path / "i2v")
    with pytest.raises(
        ValueError, match=r"The reward model .*i2v does not fit the generator: `in_channels` 36 against 16"
    ):
        build(["reward-0", "i2v"])
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    other = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint="other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"another VAE than .*, .*/other, was trained on|of another VAE than the latents"
    ):
        build(["reward-0", "other"])
