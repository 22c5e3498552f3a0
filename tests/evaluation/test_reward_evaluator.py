import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel

from hy_prfl.data.collators import collate_latents
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.evaluation.reward_evaluator import RewardEvaluator, classification_metrics, pair_metrics
from hy_prfl.flow_matching import row_noise
from hy_prfl.models.reward_model import WanRewardModel


def test_classification_metrics_by_hand() -> None:
    logits, labels = np.array([2.0, 1.0, -1.0, -3.0, 0.5]), np.array([1, 0, 1, 0, 1])
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["precision"] == pytest.approx(2 / 3)
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(2 / 3)
    order = [(good, poor) for good in (2.0, -1.0, 0.5) for poor in (1.0, -3.0)]
    assert metrics["auc"] == pytest.approx(sum(good > poor for good, poor in order) / len(order))
    likelihoods = [1 / (1 + math.exp(-z if y else z)) for z, y in zip(logits, labels, strict=True)]
    assert metrics["loss"] == pytest.approx(-sum(map(math.log, likelihoods)) / 5)


def test_one_class_has_no_auc_and_large_logits_stay_finite() -> None:
    metrics = classification_metrics(np.array([900.0, -900.0]), np.array([1, 1]))
    assert "auc" not in metrics
    assert metrics["loss"] == pytest.approx(450.0)


def test_pair_metrics_by_hand() -> None:
    metrics = pair_metrics(np.array([2.0, 0.0, 1.0]), np.array([1.0, 3.0, 1.0]))
    assert metrics["pair_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in (1, -3, 0)]))


@pytest.fixture
def model(pipeline_dir: Path) -> WanRewardModel:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    return WanRewardModel.from_transformer(transformer, num_layers=2).eval()


def test_result_does_not_depend_on_the_batch(
    tmp_path: Path, write_latents: Callable[..., Path], model: WanRewardModel
) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6, shapes=((2, 4, 4), (2, 4, 6)))))
    rows, labels = list(range(6)), [0, 1, 0, 1, 0, 1]
    results = [
        RewardEvaluator(dataset, rows, labels, timesteps=[300, 1000], seed=5, batch_size=size)(
            model, Accelerator(cpu=True)
        )
        for size in (1, 4)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0]["loss"] == pytest.approx((results[0]["loss/t300"] + results[0]["loss/t1000"]) / 2)
    other = RewardEvaluator(dataset, rows, labels, timesteps=[300, 1000], seed=6, batch_size=4)
    assert other(model, Accelerator(cpu=True))["loss"] != results[1]["loss"]


def test_both_clips_of_a_pair_get_the_same_noise(
    tmp_path: Path, write_latents: Callable[..., Path], model: WanRewardModel
) -> None:
    """Pure noise is all that is left at sigma 1: with one prompt and one noise, a pair is a tie."""
    path = write_latents(tmp_path / "d", 2)
    dataset = load_latent_dataset(str(path))
    embeds = dataset.with_format(None)[0]
    same_prompt = {name: embeds[name] for name in ("prompt_embeds", "prompt_embeds_shape")}
    path = write_latents(tmp_path / "e", 2, overrides={0: _arrays(same_prompt), 1: _arrays(same_prompt)})
    evaluator = RewardEvaluator(
        load_latent_dataset(str(path)), [(1, 0)], None, timesteps=[500, 1000], seed=0, batch_size=2
    )
    metrics = evaluator(model, Accelerator(cpu=True))
    assert metrics["loss/t1000"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["loss/t500"] != pytest.approx(math.log(2), abs=1e-5)


def _arrays(columns: dict[str, list[float]]) -> dict[str, object]:
    return columns | {"prompt_embeds": np.array(columns["prompt_embeds"], np.float16)}


def test_gradients_are_not_tracked(tmp_path: Path, write_latents: Callable[..., Path], model: WanRewardModel) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 2)))
    tracked: list[bool] = []
    model.register_forward_hook(lambda module, args, output: tracked.append(output.logits.requires_grad))
    RewardEvaluator(dataset, [0, 1], [0, 1], timesteps=[500], seed=0, batch_size=2)(model, Accelerator(cpu=True))
    assert tracked == [False]
    assert torch.is_grad_enabled()


def test_random_timesteps_one_in_each_fifth(
    tmp_path: Path, write_latents: Callable[..., Path], model: WanRewardModel
) -> None:
    """The paper's protocol, written out for each clip by itself."""
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 6)))
    rows, labels = list(range(6)), [0, 1, 0, 1, 0, 1]
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs["timestep"]), with_kwargs=True)

    def evaluate(batch_size: int, seed: int = 5) -> dict[str, float]:
        seen.clear()
        options: dict[str, Any] = {"timesteps": [300, 700], "num_random_timesteps": 5, "seed": seed}
        return RewardEvaluator(dataset, rows, labels, batch_size=batch_size, **options)(model, Accelerator(cpu=True))

    metrics = evaluate(1)
    drawn = torch.stack([torch.cat(seen[start + 2 : start + 7]) for start in range(0, 42, 7)])
    assert ((drawn > torch.arange(5) * 200) & (drawn <= torch.arange(1, 6) * 200)).all()
    assert len(set(drawn.flatten().tolist())) == 30
    again = evaluate(3)
    assert again == pytest.approx(metrics, rel=1e-4)
    assert torch.equal(torch.cat(seen[2:7]).view(5, 3).T, drawn[:3])
    evaluate(1, seed=6)
    assert not torch.isclose(torch.cat(seen[2:7]), drawn[0]).any()

    # The logits of one range, and their metrics, by hand.
    losses = []
    for index, label in enumerate(labels):
        clip = collate_latents(table_to_rows(dataset[index])).to(torch.device("cpu"))
        assert clip.latents is not None
        noise, sigma = row_noise(f"clip-{index}", clip.latents.shape[1:], seed=5), drawn[index, 3] / 1000
        logit = model(
            hidden_states=(1 - sigma) * clip.latents + sigma * noise,
            timestep=drawn[index, 3][None],
            encoder_hidden_states=clip.prompt_embeds,
        ).logits.detach()
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor([float(label)])).item())
    assert metrics["loss/random_t600_800"] == pytest.approx(np.mean(losses), rel=1e-4)
    ranges = [f"random_t{low}_{low + 200}" for low in range(0, 1000, 200)]
    assert metrics["loss/random"] == pytest.approx(np.mean([metrics[f"loss/{each}"] for each in ranges]))
    # The fixed ones keep their names and their mean.
    fixed = RewardEvaluator(dataset, rows, labels, timesteps=[300, 700], seed=5, batch_size=1)
    assert metrics.items() >= fixed(model, Accelerator(cpu=True)).items()
    assert not any("random" in name for name in fixed(model, Accelerator(cpu=True)))


def test_both_clips_of_a_pair_get_the_same_random_timesteps(
    tmp_path: Path, write_latents: Callable[..., Path], model: WanRewardModel
) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 4)))
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs["timestep"]), with_kwargs=True)
    evaluator = RewardEvaluator(
        dataset, [(1, 0), (3, 2)], None, timesteps=[500], num_random_timesteps=2, seed=0, batch_size=4
    )
    metrics = evaluator(model, Accelerator(cpu=True))
    assert {"pair_accuracy/random", "auc/random", "loss/random_t0_500", "loss/random_t500_1000"} <= set(metrics)
    # Chosen clips first, then rejected ones.
    for timesteps in seen[1:]:
        assert torch.equal(timesteps[:2], timesteps[2:])
        assert timesteps[0] != timesteps[1]
