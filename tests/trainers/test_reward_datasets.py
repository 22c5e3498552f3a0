"""A reward model trained on several datasets, and from another reward model."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_from_disk
from sklearn.metrics import accuracy_score, roc_auc_score

from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.data.collators import LatentBatch, collate_latents
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows
from hy_prfl.flow_matching import row_noise
from hy_prfl.formats.checkpoints import FILES_FILE
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.reward_trainer import RewardTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_latents: Callable[..., Path]) -> Path:
    """Two training datasets, `old` of 8 and `new` of 4 rows, and two of 6 and 4 rows for validation. Read only."""
    root = tmp_path_factory.mktemp("datasets")
    for seed, (name, number) in enumerate({"old": 8, "new": 4, "held_out/old": 6, "held_out/new": 4}.items()):
        ids = {index: {"id": f"{name}-{index}", "prompt": f"prompt {index // 2}"} for index in range(number)}
        write_latents(root / name, number, seed=seed, overrides=ids)
    return root


@pytest.fixture
def build(folder: Path, reward_builder: Callable[..., RewardTrainer]) -> Callable[..., RewardTrainer]:
    """Function that builds a trainer on both datasets, with options on top of quick ones."""
    return partial(reward_builder, train_dataset=[str(folder / "old"), str(folder / "new")], train_batch_size=2)


def ids_of(trainer: RewardTrainer, number: int) -> list[list[str]]:
    stream = trainer.datasets.batches(0)
    return [next(stream).ids for _ in range(number)]


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_one_dataset_is_as_before_however_it_is_given(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path, loss: str
) -> None:
    results = []
    for index, name in enumerate((str(folder / "old"), [str(folder / "old")])):
        weights = [1.0] if index else None
        build(
            train_dataset=name, train_dataset_weights=weights, output_dir=str(tmp_path / str(index)), loss=loss
        ).train()
        results.append(WanRewardModel.from_pretrained(str(tmp_path / str(index) / "reward_model")).state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_rows_of_each_dataset_are_drawn_by_its_weight(
    build: Callable[..., RewardTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer = build(train_dataset_weights=[0.5, 3.0], train_batch_size=1)
    assert trainer.datasets.batches_per_epoch == 4 + 12
    seen = Counter(row for ids in ids_of(trainer, 16) for row in ids)
    assert {row: number for row, number in seen.items() if row.startswith("new")} == {f"new-{i}": 3 for i in range(4)}
    assert sorted(number for row, number in seen.items() if row.startswith("old")) == [1] * 4
    assert "new: 12 of the 16 draws of an epoch" in caplog.text
    assert build(train_dataset_weights=[0.5, 3.0], max_train_steps=None).max_train_steps == 8


def test_pairs_are_made_within_a_dataset(build: Callable[..., RewardTrainer]) -> None:
    """Both datasets have clips of `prompt 0`."""
    trainer = build(loss="bt")
    pairs = [(chosen["id"], rejected["id"]) for chosen, rejected in map(trainer.datasets.rows.__getitem__, range(6))]
    expected = [
        (f"{name}-{i + 1}", f"{name}-{i}") for name, number in (("old", 8), ("new", 4)) for i in range(0, number, 2)
    ]
    assert pairs == expected
    with pytest.raises(
        ValueError, match="`train_dataset_weights` must be a number in \\(0, 1000\\] for each of the 2"
    ):
        build(loss="bt", train_dataset_weights=[1.0])


def test_rows_that_are_trained_on_and_held_out(
    build: Callable[..., RewardTrainer], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        build(validation_dataset=[str(folder / "held_out" / "old")])
    assert "have the id of a row that is trained on" not in caplog.text
    with caplog.at_level(logging.WARNING):
        trainer = build()
        build(validation_dataset=trainer.config.train_dataset[:1])
    assert "8 rows of" in caplog.text
    assert "have the id of a row that is trained on" in caplog.text


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_each_validation_dataset_is_reported_by_itself(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path, loss: str
) -> None:
    """Against runs on each alone, and the pooled ones against the scores of both and scikit-learn."""
    held_out = [str(folder / "held_out" / name) for name in ("old", "new")]
    options: dict[str, Any] = {"loss": loss, "validation_timesteps": [300, 800], "metric_for_best_model": "auc"}
    build(validation_dataset=held_out, **options).train()
    found = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation/new/auc/t300"] == found["new/auc/t300"]
    for name, path in zip(("old", "new"), held_out, strict=True):
        alone = build(validation_dataset=path, output_dir=str(tmp_path / name), **options)
        alone.train()
        assert alone.evaluator is not None
        metrics = alone.evaluator(alone.wrapped, alone.accelerator)
        assert not any(each.startswith(f"{name}/") for each in metrics)
        assert {f"{name}/{each}": value for each, value in metrics.items()} == pytest.approx(
            {each: value for each, value in found.items() if each.startswith(f"{name}/")}, rel=1e-5
        )
    if loss == "bce":
        model = WanRewardModel.from_pretrained(str(tmp_path / "out" / "best")).eval()
        rows = [row for path in held_out for row in table_to_rows(load_latent_dataset(path)[:])]
        clips = [collate_latents([row]).to(torch.device("cpu")) for row in rows]
        logits = np.array([logit_of(model, clip, row["id"], 0.8) for clip, row in zip(clips, rows, strict=True)])
        labels = [row["physics_quality"] for row in rows]
        assert found["auc/t800"] == pytest.approx(roc_auc_score(labels, logits))
        assert found["accuracy/t800"] == pytest.approx(accuracy_score(labels, logits > 0))


@torch.no_grad()
def logit_of(model: WanRewardModel, clip: LatentBatch, row_id: str, sigma: float) -> float:
    assert clip.latents is not None
    noisy = (1 - sigma) * clip.latents + sigma * row_noise(row_id, clip.latents.shape[1:], seed=0)
    return model(noisy, torch.tensor([1000 * sigma]), clip.prompt_embeds).logits.item()


def test_a_part_of_one_class_has_no_auc(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    good = {i: {"id": f"good-{i}", "physics_quality": 1, "human_quality": 1} for i in range(2)}
    write_latents(tmp_path / "good", 2, overrides=good)
    build(validation_dataset=[str(folder / "held_out" / "old"), str(tmp_path / "good")]).train()
    found = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert {"auc", "old/auc", "good/accuracy"} <= set(found)
    assert "good/auc" not in found


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_resuming_equals_never_having_stopped(build: Callable[..., RewardTrainer], tmp_path: Path, loss: str) -> None:
    options: dict[str, Any] = {"loss": loss, "train_dataset_weights": [0.5, 2.0], "train_batch_size": 1}
    whole = build(max_train_steps=5, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    build(max_train_steps=3, **options).train()
    second = build(max_train_steps=5, resume_from_checkpoint="latest", **options)
    second.train()
    expected = whole.unwrapped.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.unwrapped.state_dict().items())


def test_resuming_with_other_datasets_goes_on_and_says_so(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(train_dataset=str(folder / "old")).train()
    # As a version wrote it that took one dataset.
    path = tmp_path / "out" / "checkpoint-2" / "config.yaml"
    before = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**before, "train_dataset": str(folder / "old")}))
    (path.parent / FILES_FILE).unlink()
    build(train_dataset=str(folder / "old"), max_train_steps=3, resume_from_checkpoint="latest").train()
    assert "`train_dataset`" not in caplog.text
    build(train_dataset_weights=[1.0, 2.0], max_train_steps=4, resume_from_checkpoint="latest").train()
    assert "`train_dataset` was" in caplog.text
    assert "in the order of the new dataset" in caplog.text
    assert "`train_dataset_weights` was None before the checkpoint and is [1.0, 2.0] now: applied" in caplog.text


def changed(write_latents: Callable[..., Path], path: Path, **columns: Any) -> str:
    rows = {index: {"id": f"{path.name}-{index}", **columns} for index in range(4)}
    return str(write_latents(path, 4, overrides=rows))


def test_datasets_that_do_not_go_together_are_refused(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    old = str(folder / "old")
    same = str(write_latents(tmp_path / "same", 3, overrides={i: {"id": f"old-{i + 6}"} for i in range(3)}))
    with pytest.raises(ValueError, match=r"same: row 'old-6' has the same id as a row of .*old; 2 of 3 rows"):
        build(train_dataset=[old, same])
    with pytest.raises(ValueError, match=r"`validation_dataset` must be different datasets"):
        build(validation_dataset=[old, old])
    vae = changed(write_latents, tmp_path / "vae", vae_fingerprint="other")
    with pytest.raises(ValueError, match="vae: of another VAE than the pipeline: `vae_fingerprint` other"):
        build(train_dataset=[old, vae])
    text = changed(write_latents, tmp_path / "text", text_encoder_fingerprint="other")
    with pytest.raises(
        ValueError, match=r"text: prompts of another text encoder than those of .*old.* other against tiny"
    ):
        build(train_dataset=[old, text])
    unlabelled = changed(write_latents, tmp_path / "unlabelled", human_quality=None)
    with pytest.raises(ValueError, match="unlabelled: no row has a label for the task 'motion_quality'"):
        build(train_dataset=[old, unlabelled])
    single = load_from_disk(folder / "new")
    features = single.features.copy()
    features["latents"] = type(features["latents"])(type(features["latents"].feature)("float32"))
    single.cast(features).save_to_disk(tmp_path / "single")
    with pytest.raises(ValueError, match="single: `latents` is float32, in .*old it is float16"):
        build(train_dataset=[old, str(tmp_path / "single")])


def test_datasets_from_python_need_a_name_each(folder: Path, pipeline_dir: Path, tmp_path: Path) -> None:
    config = RewardTrainingConfig(
        output_dir=str(tmp_path),
        pretrained_model_name_or_path=str(pipeline_dir),
        train_dataset="old",
        report_to=["none"],
    )
    rows = [load_latent_dataset(str(folder / name)) for name in ("old", "new")]
    with pytest.raises(ValueError, match=r"`train_dataset` must be 2 names, one for each dataset, got \['old'\]"):
        RewardTrainer(config, reward_model=None, train_dataset=rows)  # type: ignore[arg-type]


def test_a_reward_model_to_start_from_keeps_its_head_and_gets_a_new_optimizer(
    build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path
) -> None:
    build(train_dataset=str(folder / "old")).train()
    start: dict[str, Any] = {"reward_model": str(tmp_path / "out" / "reward_model")}
    saved = WanRewardModel.from_pretrained(start["reward_model"])
    trainer = build(output_dir=str(tmp_path / "second"), adam_weight_decay=0.0, max_train_steps=1, **start)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in trainer.unwrapped.state_dict().items())
    assert not trainer.updates.optimizer.state
    trainer.train()
    # The first step of a new Adam is the learning rate in each weight whose gradient is not tiny.
    moved = (trainer.unwrapped.head.linear_3.weight - saved.head.linear_3.weight).abs().max().item()
    assert moved == pytest.approx(1e-3, rel=0.05)
    for options in ({"num_layers": 3}, {"pooling": "mean"}):
        with pytest.raises(ValueError, match=r"`(num_layers|pooling)` must be left out, or .* as in the reward model"):
            build(output_dir=str(tmp_path / "third"), **start, **options)


def test_a_run_from_a_reward_model_resumes(build: Callable[..., RewardTrainer], folder: Path, tmp_path: Path) -> None:
    build(train_dataset=str(folder / "old")).train()
    start = {"reward_model": str(tmp_path / "out" / "reward_model")}
    whole = build(output_dir=str(tmp_path / "whole"), max_train_steps=4, **start)
    whole.train()
    build(output_dir=str(tmp_path / "parts"), max_train_steps=2, **start).train()
    second = build(output_dir=str(tmp_path / "parts"), max_train_steps=4, resume_from_checkpoint="latest", **start)
    second.train()
    expected = whole.unwrapped.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.unwrapped.state_dict().items())
