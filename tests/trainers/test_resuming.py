"""Runs that go on with other options, from an earlier step, or in the folder of another run."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hy_prfl.data.labels import label_dataset
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer


@pytest.fixture
def build(
    tmp_path: Path, write_latents: Callable[..., Path], reward_builder: Callable[..., RewardTrainer]
) -> Callable[..., RewardTrainer]:
    """Function that builds a trainer of a reward model, with options on top of quick ones."""
    write_latents(tmp_path / "train", 8)
    write_latents(tmp_path / "validation", 6, seed=1)

    return partial(reward_builder, num_layers=1, max_train_steps=6, checkpointing_steps=2, head_learning_rate=2e-3)


@pytest.fixture
def build_prfl(prfl_builder: Callable[..., Any], pipeline_dir: Path) -> Callable[..., PRFLTrainer]:
    return prfl_builder(pipeline_dir)


def watch_updates(trainer: Trainer) -> list[dict[str, Any]]:
    """The list that gets, at each update, weights before, clipped gradients and weights after, by group."""
    updates: list[dict[str, Any]] = []
    optimizer = trainer.updates.optimizer
    step = optimizer.step

    def watched() -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        before = [[value.detach().clone() for value in group] for group in groups]
        grads = [[value.grad.clone() for value in group] for group in groups]
        step()
        after = [[value.detach().clone() for value in group] for group in groups]
        updates.append({"before": before, "grads": grads, "after": after})

    optimizer.step = watched
    return updates


# Peak of the schedule and number of updates -> learning rate.
SCHEDULES: list[tuple[dict[str, Any], Callable[[float, int], float]]] = [
    ({}, lambda peak, step: peak),
    ({"lr_scheduler": "linear", "max_train_steps": 8}, lambda peak, step: peak * (8 - step) / 8),
    (
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
        lambda peak, step: peak * min(1, step / 5),
    ),
    (
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 9},
        lambda peak, step: peak * (1 + math.cos(math.pi * (step - 1) / 8)) / 2,
    ),
]


@pytest.mark.parametrize("engine", ["whole", "another"])
@pytest.mark.parametrize(("schedule", "rate"), SCHEDULES)
def test_changed_optimizer_options_move_the_weights(
    build: Callable[..., RewardTrainer],
    tmp_path: Path,
    schedule: dict[str, Any],
    rate: Callable[[float, int], float],
    engine: str,
) -> None:
    """AdamW of the new options, written out on the saved moments; on moments of zero after another engine."""
    build(max_train_steps=2, lr_scheduler="linear", lr_warmup_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    if engine == "another":
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"engine": "ZeRO-3"}))
    options: dict[str, Any] = {"max_train_steps": 4, "lr_scheduler": "constant", "lr_warmup_steps": 0, **schedule}
    options |= {"learning_rate": 1e-4, "head_learning_rate": 3e-4, "max_grad_norm": 0.5}
    options |= {"adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "adam_weight_decay": 0.2}
    trainer = build(**options, resume_from_checkpoint="latest")
    trainer._start_run()
    updates = watch_updates(trainer)
    trainer.start_streams()
    trainer.train_step()
    (update,) = updates
    norm = torch.cat([grad.flatten() for group in update["grads"] for grad in group]).norm()
    assert norm <= 0.5 * (1 + 1e-5)

    index = 0
    for group, peak in enumerate((1e-4, 3e-4)):
        lr = rate(peak, 2)
        for before, grad, after in zip(*(update[name][group] for name in ("before", "grads", "after")), strict=True):
            moments = saved[index] if engine == "whole" else None
            step = 3 if moments else 1
            first = 0.7 * (moments["exp_avg"] if moments else 0) + 0.3 * grad
            second = 0.9 * (moments["exp_avg_sq"] if moments else 0) + 0.1 * grad.square()
            move = (first / (1 - 0.7**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
            torch.testing.assert_close(after, before * (1 - lr * 0.2) - lr * move, rtol=1e-5, atol=1e-9)
            index += 1
    # What is logged is what was done, and the schedule goes on from there.
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([rate(1e-4, 2), rate(3e-4, 2)])
    trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([rate(1e-4, 3), rate(3e-4, 3)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_unchanged_options_leave_the_rates_bit_for_bit(build: Callable[..., RewardTrainer], name: str) -> None:
    options = {"lr_scheduler": name, "lr_warmup_steps": 1, "lr_num_cycles": 2, "lr_power": 2.0}
    first = build(**options)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        name, optimizer=optimizer, num_warmup_steps=1, num_training_steps=6, num_cycles=2, power=2.0
    )
    first.config.max_train_steps = first.max_train_steps = 4
    first.train()
    second = build(**options, resume_from_checkpoint="latest")
    second._start_run()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert second.updates.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_the_schedule_drives_what_trains_if_the_engine_has_made_another_optimizer(
    build: Callable[..., RewardTrainer],
) -> None:
    """Accelerate replaces AdamW by DeepSpeed's for an offloaded optimizer; loading gives that one groups of its own."""
    build(max_train_steps=2, lr_scheduler="linear").train()
    trainer = build(max_train_steps=4, lr_scheduler="linear", resume_from_checkpoint="latest")
    schedule = trainer.lr_scheduler
    schedule.optimizer = torch.optim.AdamW(schedule.optimizer.param_groups, lr=1e-3)
    trainer._start_run()
    groups = trainer.updates.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.5e-3, 1e-3])
    schedule.step()
    assert [group["lr"] for group in trainer.updates.optimizer.param_groups] == pytest.approx([0.25e-3, 0.5e-3])


def test_the_log_names_the_rate_that_trains(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(max_train_steps=2).train()
    build(max_train_steps=3, learning_rate=1e-5, num_train_epochs=2, resume_from_checkpoint="latest").train()
    assert "`learning_rate` was 0.001 before the checkpoint and is 1e-05 now: applied." in caplog.text
    assert "`num_train_epochs` was 1 before the checkpoint and is 2 now: ignored, `max_train_steps`" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/learning_rate"] for line in lines] == [1e-3, 1e-3, 1e-5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 8}, "`lora_rank` must be 2, as before the checkpoint, got 8"),
        ({"lora_alpha": 8.0}, "`lora_alpha` must be None, as before the checkpoint, got 8.0"),
        ({"num_layers": 2}, "`num_layers` must be 1, as before"),
        ({"pooling": "mean"}, "`pooling` must be 'query', as before"),
        ({"max_train_steps": 1}, "`max_train_steps` must be at least 2, the step of .*checkpoint-2, got 1"),
    ],
)
def test_what_cannot_go_on_is_refused_before_anything_is_loaded(
    build: Callable[..., RewardTrainer], options: dict[str, Any], message: str
) -> None:
    build(max_train_steps=2, lora_rank=2).train()
    nowhere = {"pretrained_model_name_or_path": "nowhere", "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=message):
        build(**({"max_train_steps": 2, "lora_rank": 2} | options), **nowhere)


def test_epochs_that_end_before_the_checkpoint(build: Callable[..., RewardTrainer]) -> None:
    build(max_train_steps=4).train()
    trainer = build(max_train_steps=None, num_train_epochs=1, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least 4, the step of .*checkpoint-4, got 2"):
        trainer.train()


def test_the_last_checkpoint_only_writes_the_result(build: Callable[..., RewardTrainer], tmp_path: Path) -> None:
    build(max_train_steps=2).train()
    file = tmp_path / "out" / "reward_model" / "diffusion_pytorch_model.safetensors"
    expected = file.read_bytes()
    file.unlink()
    build(max_train_steps=2, resume_from_checkpoint="latest").train()
    assert file.read_bytes() == expected
    assert not (tmp_path / "out" / "abandoned-1").exists()


def test_a_checkpoint_of_another_trainer_or_cut_short(
    build: Callable[..., RewardTrainer], build_prfl: Callable[..., PRFLTrainer], tmp_path: Path
) -> None:
    build(max_train_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"checkpoint-2 was written by RewardTrainer, this is PRFLTrainer"):
        build_prfl(output_dir=str(tmp_path / "prfl"), resume_from_checkpoint=str(checkpoint))
    weights = checkpoint / "reward_model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-2 is not complete: 'reward_model/diff.*' has 100 bytes instead"):
        build(resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("a: [", "cannot be read"), ("", "expected the options of the run")],
)
def test_a_checkpoint_without_its_options(
    build: Callable[..., RewardTrainer], tmp_path: Path, text: str | None, message: str
) -> None:
    build(max_train_steps=2).train()
    path = tmp_path / "out" / "checkpoint-2" / "config.yaml"
    (tmp_path / "out" / "checkpoint-2" / "files.json").unlink()
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"checkpoint-2/config\.yaml: .*{message}"):
        build(resume_from_checkpoint="latest")


def test_going_back_goes_on_from_the_steps_that_were_written_last(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The bug report: six steps, back to the second with a limit of one."""
    run = tmp_path / "out"
    validation = {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 1}
    build(**validation, report_to=["tensorboard"]).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    old = {path.name: path.stat().st_ino for path in run.glob("checkpoint-*")}
    options = {"resume_from_checkpoint": str(run / "checkpoint-2"), "learning_rate": 1e-4, "max_train_steps": 4}
    with caplog.at_level(logging.INFO):
        build(**options, **validation, checkpoints_total_limit=1, report_to=["tensorboard"]).train()
    assert "continues after step 2. Files of later steps were moved to" in caplog.text
    assert f"Deleting {run / 'abandoned-1' / 'checkpoint-6'}: `checkpoints_total_limit` is 1" in caplog.text
    assert [path.name for path in run.rglob("checkpoint-*")] == ["checkpoint-4"]
    assert (run / "checkpoint-4").stat().st_ino != old["checkpoint-4"]
    # Each step once, the abandoned ones beside.
    now = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in now if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["train/learning_rate"] for line in now if "train/loss" in line] == [1e-3, 1e-3, 1e-4, 1e-4]
    kept = [json.loads(line) for line in (run / "abandoned-1" / "metrics.jsonl").read_text().splitlines()]
    assert kept == [line for line in lines if line["step"] > 2]
    assert (run / "abandoned-1" / "reward_model" / "config.json").is_file()
    _, record = json.loads((run / "run.json").read_text())
    assert (record["resumed_step"], record["abandoned"], record["finished_step"]) == (2, "abandoned-1", 4)
    events = EventAccumulator(str(run / "logs" / "hy_prfl")).Reload().Scalars("train/learning_rate")
    assert [(event.step, event.value) for event in events] == [
        (1, pytest.approx(1e-3)), (2, pytest.approx(1e-3)), (3, pytest.approx(1e-4)), (4, pytest.approx(1e-4)),
    ]  # fmt: skip
    # `latest` is the new fourth step.
    trainer = build(resume_from_checkpoint="latest", **validation)
    assert trainer.run.checkpoint == run / "checkpoint-4"


def test_the_best_model_of_abandoned_steps(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, options = tmp_path / "out", {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 2}
    build(max_train_steps=4, **options, metric_for_best_model="loss").train()
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert best["global_step"] == 4
    options |= {"resume_from_checkpoint": str(run / "checkpoint-2"), "metric_for_best_model": "loss"}
    trainer = build(max_train_steps=4, **options, head_learning_rate=1e-9, learning_rate=1e-9)
    trainer.train()
    assert "The checkpoint's best " in caplog.text
    assert "belongs to a model that is no longer there: the next validation replaces" in caplog.text
    assert json.loads((run / "abandoned-1" / "best" / "metrics.json").read_text()) == best
    report = json.loads((run / "best" / "metrics.json").read_text())
    assert report["global_step"] == 4
    assert report["loss"] == trainer.best_metric != best["loss"]
    WanRewardModel.from_pretrained(run / "best")


@pytest.mark.parametrize("change", ["metric", "timesteps", "rows"])
def test_best_by_another_measure(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Accuracy is best where it is high, the loss where it is low: 0.5 of one says nothing about the other."""
    options: dict[str, Any] = {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 2}
    build(max_train_steps=2, **options, metric_for_best_model="loss").train()
    name = {"metric": "metric_for_best_model", "timesteps": "validation_timesteps", "rows": "validation_dataset"}
    options["metric_for_best_model"] = "accuracy" if change == "metric" else "loss"
    if change == "timesteps":
        options["validation_timesteps"] = [500]
    elif change == "rows":
        label_dataset(options["validation_dataset"], {"clip-1": {"physics_quality": 0}}, options["validation_dataset"], overwrite=True)  # fmt: skip
    trainer = build(max_train_steps=4, resume_from_checkpoint="latest", learning_rate=1e-9, **options)
    trainer._start_run()
    assert trainer.best_metric is None
    assert "The checkpoint's best loss, " in caplog.text
    assert f"was measured with another {name[change]}: the next validation replaces" in caplog.text


def test_without_validation_the_best_model_stays(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation: dict[str, Any] = {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 2}
    first = build(max_train_steps=2, **validation)
    first.train()
    trainer = build(max_train_steps=4, resume_from_checkpoint="latest")
    trainer.train()
    assert "is None now: applied; no other model becomes the best." in caplog.text
    assert "the next validation replaces" not in caplog.text
    assert trainer.best_metric == first.best_metric
    caplog.clear()
    build(max_train_steps=6, resume_from_checkpoint="latest", **validation)._start_run()
    assert f"The checkpoint's best {first.config.metric_for_best_model}, " in caplog.text
    assert "applied; the search for the best model starts over" in caplog.text


def test_the_best_model_stays_if_what_changed_has_no_effect(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 2}
    first = build(max_train_steps=2, **options)
    first.train()
    config = tmp_path / "out" / "checkpoint-2" / "config.yaml"
    (tmp_path / "out" / "checkpoint-2" / "files.json").unlink()
    config.write_text(config.read_text() + "use_8bit_adam: true\n")
    trainer = build(resume_from_checkpoint="latest", allow_unpaired=True, learning_rate=1e-4, **options)
    trainer._start_run()
    assert trainer.best_metric == first.best_metric is not None
    assert "`allow_unpaired` was False before the checkpoint and is True now: ignored, `loss` is bce." in caplog.text
    assert "`use_8bit_adam` was True before the checkpoint" in caplog.text


def test_another_seed_and_other_rows(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(max_train_steps=2, lora_rank=2, lora_dropout=0.5).train()
    label_dataset(str(tmp_path / "train"), {"clip-1": {"blur_quality": 0}}, tmp_path / "train")
    trainer = build(lora_rank=2, lora_dropout=0.5, seed=5, resume_from_checkpoint="latest")
    trainer._start_run()
    assert "`seed` was 0 before the checkpoint and is 5 now: applied" in caplog.text
    assert f"`train_dataset`: the rows of {tmp_path / 'train'} have changed since" in caplog.text
    torch_state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch_state, torch.get_rng_state())


def scale_weights(folder: Path) -> None:
    """Put another model of the same shapes into a folder."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("option", "folder"),
    [
        ("reward_model", "reward"),
        ("pretrained_model_name_or_path", "pipeline/transformer"),
        ("pretrained_model_name_or_path", "pipeline/vae"),
        ("pretrained_model_name_or_path", "pipeline/scheduler"),
    ],
)
def test_other_models_at_the_same_place(
    build_prfl: Callable[..., PRFLTrainer],
    pipeline_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    option: str,
    folder: str,
) -> None:
    shutil.copytree(pipeline_dir, tmp_path / "pipeline")
    options = {"pretrained_model_name_or_path": str(tmp_path / "pipeline"), "lora_rank": 2}
    build_prfl(**options, max_train_steps=1).train()
    build_prfl(**options, resume_from_checkpoint="latest")._start_run()
    assert "have changed since" not in caplog.text
    if folder.endswith("scheduler"):
        config = tmp_path / folder / "scheduler_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "flow_shift": 4.0}))
    elif folder.endswith("vae"):
        # Only touched, as by a copy: whether it is another one, the check of the fingerprint tells.
        os.utime(tmp_path / folder / "config.json", (1, 1))
    else:
        scale_weights(tmp_path / folder)
    build_prfl(**options, resume_from_checkpoint="latest")._start_run()
    (line,) = [each for each in caplog.messages if "have changed since" in each]
    assert f"`{option}`: the files of {tmp_path / folder} have changed since the checkpoint (names" in line
    assert ("frozen weights are read from there" in line) == (option != "reward_model")


def test_another_reward_model_to_start_from_at_the_same_place(
    build: Callable[..., RewardTrainer],
    build_prfl: Callable[..., PRFLTrainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"reward_model": str(tmp_path / "reward"), "num_layers": 2}
    build(**options, max_train_steps=2).train()
    scale_weights(tmp_path / "reward")
    build(**options, resume_from_checkpoint="latest")._start_run()
    assert f"`reward_model`: the files of {tmp_path / 'reward'} have changed since" in caplog.text
    assert "trained weights come from the checkpoint" in caplog.text


def test_going_on_from_another_runs_checkpoint(build: Callable[..., RewardTrainer], tmp_path: Path) -> None:
    options = {"validation_dataset": str(tmp_path / "validation"), "validation_steps": 2}
    build(max_train_steps=2, **options).train()
    checkpoint, second = tmp_path / "out" / "checkpoint-2", tmp_path / "second"
    build(max_train_steps=4, **options, output_dir=str(second), resume_from_checkpoint=str(checkpoint)).train()
    assert [path.name for path in sorted(second.glob("checkpoint-*"))] == ["checkpoint-4"]
    # The best model of the other run is not here, so the first one here is the best.
    assert json.loads((second / "best" / "metrics.json").read_text())["global_step"] == 4
    with pytest.raises(ValueError, match=r"out/checkpoint-2 is not in `output_dir` .*second, which already holds"):
        build(output_dir=str(second), resume_from_checkpoint=str(checkpoint))


def test_starting_anew_in_a_folder_whose_checkpoints_were_deleted(
    build: Callable[..., RewardTrainer], tmp_path: Path
) -> None:
    run = tmp_path / "out"
    build(max_train_steps=1, checkpointing_steps=1).train()
    expected = (run / "reward_model" / "diffusion_pytorch_model.safetensors").read_bytes()
    for path in (run / "checkpoint-1").rglob("*"):
        if path.is_file():
            path.unlink()
    (run / "checkpoint-1").rename(run / "elsewhere")
    build(max_train_steps=1, resume_from_checkpoint="latest", learning_rate=1e-2).train()
    moved = run / "abandoned-1"
    assert (moved / "reward_model" / "diffusion_pytorch_model.safetensors").read_bytes() == expected
    assert (moved / "metrics.jsonl").read_text().count("\n") == 1
    assert (run / "metrics.jsonl").read_text().count("\n") == 1


def test_a_line_of_metrics_that_was_cut_off(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(max_train_steps=2).train()
    metrics = tmp_path / "out" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "train/lo')
    build(max_train_steps=3, resume_from_checkpoint="latest").train()
    assert metrics.read_text().startswith(whole)
    assert metrics.read_text().count("\n") == 3
    assert "line 3: the line was cut off and is left out" in caplog.text
    metrics.write_text("{\n" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a JSON object with `step`"):
        build(max_train_steps=4, resume_from_checkpoint="latest").train()


class TestAverage:
    def average(self, trainer: PRFLTrainer) -> list[torch.Tensor]:
        assert trainer.average is not None
        return [value.clone() for value in trainer.average.ema.shadow_params]

    def test_another_decay_is_applied(self, build_prfl: Callable[..., PRFLTrainer]) -> None:
        # With 9 updates in it, diffusers' warm-up (1 + n) / (10 + n) allows a decay of 0.5.
        build_prfl(use_ema=True, ema_decay=0.9, max_train_steps=9, checkpointing_steps=9).train()
        trainer = build_prfl(use_ema=True, ema_decay=0.25, max_train_steps=10, resume_from_checkpoint="latest")
        trainer._start_run()
        before = self.average(trainer)
        trainer.start_streams()
        trainer.train_step()
        for old, weight, new in zip(before, trainer.masters.values(), self.average(trainer), strict=True):
            torch.testing.assert_close(new, 0.25 * old + 0.75 * weight.detach())

    def test_one_that_begins_begins_with_the_checkpoints_weights(
        self, build_prfl: Callable[..., PRFLTrainer], caplog: pytest.LogCaptureFixture
    ) -> None:
        first = build_prfl()
        first.train()
        weights = [value.detach().clone() for value in first.masters.values()]
        trainer = build_prfl(use_ema=True, max_train_steps=3, resume_from_checkpoint="latest")
        trainer._start_run()
        assert all(map(torch.equal, self.average(trainer), weights))
        assert trainer.average is not None
        assert trainer.average.num_averaged == 0
        assert "is True now: applied; the average begins with the checkpoint's weights." in caplog.text

    def test_one_that_ends_leaves_the_weights(
        self, build_prfl: Callable[..., PRFLTrainer], caplog: pytest.LogCaptureFixture
    ) -> None:
        build_prfl(use_ema=True).train()
        build_prfl(max_train_steps=3, resume_from_checkpoint="latest").train()
        assert "`use_ema` was True before the checkpoint and is False now: applied; no average is kept" in caplog.text
