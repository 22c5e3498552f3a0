"""What the monitor of a run measures, does and remembers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from datasets import concatenate_datasets
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from hy_prfl.data.collators import collate_latents
from hy_prfl.data.dataset import load_latent_dataset, rows_with_latents
from hy_prfl.data.schema import table_to_rows
from hy_prfl.evaluation.scoring import score_latents, score_rows
from hy_prfl.flow_matching import row_noise
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.rollout.sampling import sample_latents
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.prfl_datasets import PRFLDatasets
from hy_prfl.trainers.prfl_monitor import find_real_clips
from hy_prfl.trainers.prfl_trainer import PRFLTrainer


@pytest.fixture
def held_out(tmp_path: Path, pipeline_dir: Path, tiny_vae: str) -> list[str]:
    """Two untrained reward models that differ."""
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint=tiny_vae)
        model.save_pretrained(tmp_path / f"held_out_{seed}")
        paths.append(str(tmp_path / f"held_out_{seed}"))
    return paths


@pytest.fixture
def build(
    prfl_builder: Callable[..., Callable[..., PRFLTrainer]],
    pipeline_dir: Path,
    tmp_path: Path,
    write_latents: Callable[..., Path],
    held_out: list[str],
) -> Callable[..., PRFLTrainer]:
    """Function that builds a trainer with a monitor, which validates after each of 4 updates."""
    make = prfl_builder(pipeline_dir)
    write_latents(tmp_path / "validation", 3, seed=1)

    def build(**options: Any) -> PRFLTrainer:
        defaults: dict[str, Any] = {
            "validation_dataset": str(tmp_path / "validation"),
            "validation_steps": 1,
            "validation_timesteps": [300, 900],
            "num_validation_samples": 2,
            "monitor_reward_models": held_out,
            "max_train_steps": 4,
            "lora_rank": 2,
            "learning_rate": 1e-2,
        }
        return make(**(defaults | options))

    return build


def validation_rows(folder: Path) -> list[dict[str, Any]]:
    return table_to_rows(load_latent_dataset(str(folder))[:])


def calibration_error(rewards: torch.Tensor, labels: list[int]) -> float:
    """Bin by bin; rewards have shape `(num_clips,)`."""
    bins, error = (10 * rewards).long(), 0.0
    for each in bins.unique():
        gap = rewards[bins == each].mean() - torch.tensor(labels)[bins == each].float().mean()
        error += float(gap.abs() * (bins == each).float().mean())
    return error


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "verdict" in line]


@torch.no_grad()
def test_metrics_equal_the_same_measurements_written_out(
    build: Callable[..., PRFLTrainer], tmp_path: Path, pipeline_dir: Path, held_out: list[str]
) -> None:
    with torch.enable_grad():
        trainer = build(max_train_steps=2, validation_steps=2, num_validation_samples=3)
        trainer.train()
    base, trained = metric_lines(tmp_path / "out")
    assert (base["step"], trained["step"]) == (0, 2)
    batch = collate_latents(table_to_rows(load_latent_dataset(str(tmp_path / "validation"))[:]))
    batch = batch.to(torch.device("cpu"))
    conditioning = Conditioning.of(batch)
    noise = torch.stack([row_noise(row_id, batch.latents_shape, seed=0) for row_id in batch.ids])
    scheduler = load_scheduler(str(pipeline_dir))
    start = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").eval()
    samples = {
        name: sample_latents(
            transformer,
            scheduler,
            noise=noise,
            num_inference_steps=4,
            conditioning=conditioning,
            negative_prompt_embeds=batch.null_prompt_embeds,
            guidance_scale=1.0,
        )
        for name, transformer in (("base", start), ("trained", trainer.unwrapped.eval()))
    }
    training = WanRewardModel.from_pretrained(tmp_path / "reward").eval()
    assert batch.latents is not None
    real = score_latents(training, batch.latents, conditioning, [300, 900], row_ids=batch.ids, seed=1)
    error = calibration_error(real.sigmoid().mean(dim=1), [0, 1, 0])
    high = torch.quantile(real.mean(dim=1), 0.95)
    for line, latents in ((base, samples["base"]), (trained, samples["trained"])):
        rewards = []
        for number, path in enumerate(held_out, 1):
            model = WanRewardModel.from_pretrained(path).eval()
            logits = score_latents(model, latents, conditioning, [300, 900], row_ids=batch.ids, seed=1)
            rewards.append(logits.sigmoid())
            assert line[f"validation/monitor_reward_{number}"] == pytest.approx(float(rewards[-1].mean()), abs=1e-5)
        expected = torch.stack(rewards)
        assert line["validation/monitor_reward"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert line["validation/monitor_reward/t900"] == pytest.approx(float(expected[..., 1].mean()), abs=1e-5)
        gap = line["validation/reward"] - line["validation/monitor_reward"]
        assert line["validation/reward_gap"] == pytest.approx(gap)
        logits = score_latents(training, latents, conditioning, [300, 900], row_ids=batch.ids, seed=1)
        assert line["validation/real_reward"] == pytest.approx(float(real.sigmoid().mean()), abs=1e-5)
        above = (logits.mean(dim=1) > high).float().mean()
        assert line["validation/reward_above_real"] == pytest.approx(float(above))
        assert line["validation/calibration_error"] == pytest.approx(error, abs=1e-5)
        energy = [(each[:, :, 1] - each[:, :, 0]).square().mean() for each in (latents, batch.latents)]
        assert line["validation/latents_temporal_energy"] == pytest.approx(float(energy[0] / energy[1]), rel=1e-3)
    distance = (samples["trained"] - samples["base"]).flatten(1).norm(dim=1) / samples["base"].flatten(1).norm(dim=1)
    assert base["validation/sample_drift"] == base["validation/velocity_drift"] == 0
    assert trained["validation/sample_drift"] == pytest.approx(float(distance.mean()), rel=1e-2)
    assert trained["validation/velocity_drift"] > 1e-3
    assert {line["verdict"] for line in (base, trained)} <= {"healthy", "warn", "hacked"}
    assert (base["validation/verdict"], base["verdict_reason"]) == (0.0, "this is the base")


@pytest.mark.parametrize("options", [{}, {"lora_rank": None, "offload_reward_model": True, "use_ema": True}])
def test_the_monitor_changes_no_weight_and_a_resumed_run_judges_the_same(
    build: Callable[..., PRFLTrainer],
    interrupt_after: Callable[[Trainer, int], None],
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    options = options | {"checkpointing_steps": 2, "on_hacking": "keep_best"}
    whole = build(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    plain = build(output_dir=str(tmp_path / "plain"), **(options | {"on_hacking": None, "monitor_reward_models": []}))
    plain.train()
    for value, other in zip(whole.unwrapped.parameters(), plain.unwrapped.parameters(), strict=True):
        assert torch.equal(value, other)
    first = build(output_dir=str(tmp_path / "parts"), **options)
    interrupt_after(first, 3)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build(output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest", **options)
    assert second.measure_start() == {}
    assert whole.monitor is not None
    assert second.monitor is not None
    # Nothing is measured again, and everything is restored.
    assert second.monitor.real_rewards is None
    second.train()
    assert second.monitor.series == whole.monitor.series
    assert second.monitor.real_rewards == whole.monitor.real_rewards
    assert whole.monitor.real_rewards is not None
    assert len(whole.monitor.series) == 5
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()


def test_what_is_measured_has_changed(
    build: Callable[..., PRFLTrainer], tmp_path: Path, held_out: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The series begins again, with the base that the run has started from, though its weights have moved."""
    first = build(lora_rank=None, max_train_steps=2, monitor_reward_models=[], on_hacking="warn")
    first.train()
    assert first.monitor is not None
    second = build(lora_rank=None, resume_from_checkpoint="latest", max_train_steps=3)
    second.train()
    assert "The monitor starts over with the base" in caplog.text
    assert "The base, measured again for the validations from here on: " in caplog.text
    assert second.monitor is not None
    assert [entry["step"] for entry in second.monitor.series] == [0, 3]
    for index, sample in first.monitor.base.samples.items():
        assert torch.equal(sample, second.monitor.base.samples[index])
    # The line of the first start stays.
    assert [line["step"] for line in metric_lines(tmp_path / "out")] == [0, 1, 2, 3]


@torch.no_grad()
def test_rewards_of_real_clips_are_combined_as_those_of_samples(
    build: Callable[..., PRFLTrainer], tmp_path: Path, held_out: list[str], write_latents: Callable[..., Path]
) -> None:
    names = [str(tmp_path / "reward"), held_out[0]]
    # Also clips of two shapes, in another order than they are scored in.
    write_latents(
        tmp_path / "validation", 5, seed=2, shapes=((2, 4, 4), (2, 4, 6)), overrides={2: {"human_quality": None}}
    )
    options = {
        "reward_model": None, "reward_models": names, "reward_weights": [3.0, 1.0], "reward_disagreement": 0.5,
        "monitor_reward_models": [], "on_hacking": "warn",
    }  # fmt: skip
    trainer = build(**options)
    found = trainer.measure_start()
    rows = validation_rows(tmp_path / "validation")
    models = [WanRewardModel.from_pretrained(name).eval() for name in names]
    logits = torch.stack(
        [torch.cat([score_rows(model, [row], [300, 900], seed=1) for row in rows]) for model in models]
    )
    mean = 0.75 * logits[0] + 0.25 * logits[1]
    combined = mean - 0.5 * (0.75 * (logits[0] - mean) ** 2 + 0.25 * (logits[1] - mean) ** 2).sqrt()
    rewards = combined.sigmoid()
    assert found["real_reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    labelled = [0, 1, 3, 4]
    error = calibration_error(rewards.mean(dim=1)[labelled], [0, 1, 1, 0])
    assert found["calibration_error"] == pytest.approx(error, abs=1e-5)
    assert trainer.monitor is not None
    assert trainer.monitor.real_rewards is not None
    high = torch.quantile(combined.mean(dim=1), 0.95)
    assert trainer.monitor.real_rewards.high_logit == pytest.approx(float(high), abs=1e-5)
    # Of two tasks there is no label, and a product is of both.
    models[1].register_to_config(task="physics_quality")
    models[1].save_pretrained(tmp_path / "physics")
    options |= {"reward_models": [names[0], str(tmp_path / "physics")], "reward_weights": None}
    options |= {"reward_disagreement": 0.0, "reward_combination": "product", "output_dir": str(tmp_path / "product")}
    found = build(**options).measure_start()
    assert found["real_reward"] == pytest.approx(float((logits.sigmoid()[0] * logits.sigmoid()[1]).mean()), abs=1e-5)
    assert "calibration_error" not in found


def test_an_older_checkpoint_has_its_real_clips_scored(
    build: Callable[..., PRFLTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The base is not measured again: only the real clips are, which do not depend on the generator."""
    build(checkpointing_steps=2).train()
    lines = metric_lines(tmp_path / "out")
    state_file = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["monitor"]["real"]
    for name in ("clips", "reward_weights", "reward_combination", "reward_disagreement"):
        del state["monitor"]["basis"][name]
    state_file.write_text(json.dumps(state))
    caplog.set_level("INFO")
    second = build(checkpointing_steps=2, resume_from_checkpoint=str(state_file.parent))
    second.train()
    assert "they have been scored now" in caplog.text
    assert "starts over" not in caplog.text
    assert metric_lines(tmp_path / "out") == lines
    assert second.monitor is not None
    assert len(second.monitor.series) == 5


def test_another_combination_starts_over(
    build: Callable[..., PRFLTrainer], tmp_path: Path, held_out: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Rewards by one combination are not compared with a base by another."""
    options: dict[str, Any] = {
        "reward_model": None, "reward_models": [str(tmp_path / "reward"), held_out[0]], "monitor_reward_models": [],
        "on_hacking": "warn", "max_train_steps": 1,
    }  # fmt: skip
    build(**options).train()
    options |= {"reward_combination": "min", "max_train_steps": 2}
    second = build(**options, resume_from_checkpoint="latest")
    second.train()
    assert "The monitor starts over with the base" in caplog.text
    assert second.monitor is not None
    assert [entry["step"] for entry in second.monitor.series] == [0, 2]
    lines = metric_lines(tmp_path / "out")
    mean, *_, smallest = (line["validation/real_reward"] for line in lines)
    fresh = build(**options, output_dir=str(tmp_path / "fresh")).measure_start()
    assert smallest == fresh["real_reward"] < mean - 1e-4


def test_stop_ends_the_run_after_a_checkpoint(
    build: Callable[..., PRFLTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At this learning rate velocities move by more than their own length in two updates."""
    options = {"on_hacking": "stop", "learning_rate": 0.2, "validation_steps": 2, "checkpointing_steps": 100}
    build(**options).train()
    assert "Stopped after step 2, without a result: " in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    lines = metric_lines(tmp_path / "out")
    assert [line["verdict"] for line in lines] == ["healthy", "hacked"]
    assert [line["validation/verdict"] for line in lines] == [0, 2]
    (record,) = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["stopped_step"], record["stopped_because"]) == (2, lines[1]["verdict_reason"])
    assert "velocities are" in record["stopped_because"]
    assert "finished_step" not in record
    # It stays stopped, unless it is told to go on.
    again = build(**options, resume_from_checkpoint="latest")
    again.train()
    assert again.global_step == 2
    on = build(**(options | {"on_hacking": "warn"}), resume_from_checkpoint="latest")
    on.train()
    # As if it had never stopped.
    through = build(**(options | {"on_hacking": "warn", "output_dir": str(tmp_path / "through")}))
    through.train()
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("out", "through"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_diverges_is_hacked(build: Callable[..., PRFLTrainer], tmp_path: Path) -> None:
    """The generator's output is no longer finite after the first update. The monitor must not end the run by an error."""
    options = {"update_schedule": "reward", "learning_rate": 1e20}
    build(**options, on_hacking="stop").train()
    (record,) = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["stopped_step"] == 1
    assert "`reward` is nan" in record["stopped_because"]
    assert not (tmp_path / "out" / "best").exists()
    on = build(**options, on_hacking="keep_best", output_dir=str(tmp_path / "on"))
    on.train()
    assert [line["verdict"] for line in metric_lines(tmp_path / "on")] == ["healthy", *["hacked"] * 4]
    assert not (tmp_path / "on" / "best").exists()


def test_the_best_by_the_held_out_view_is_kept(build: Callable[..., PRFLTrainer], tmp_path: Path) -> None:
    options = {"on_hacking": "keep_best", "learning_rate": 0.05, "checkpointing_steps": 1}
    build(**options).train()
    base, *lines = metric_lines(tmp_path / "out")
    rewards = {line["step"]: line["validation/monitor_reward"] for line in lines}
    assert "hacked" not in {line["verdict"] for line in lines}
    expected = max(rewards, key=lambda step: rewards[step])
    # Neither the first validation, which is below the base, nor the last one.
    assert rewards[1] < base["validation/monitor_reward"] < rewards[expected]
    assert 1 < expected < 4
    best = tmp_path / "out" / "best"
    report = json.loads((best / "metrics.json").read_text())
    assert (report["global_step"], report["monitor_reward"]) == (expected, rewards[expected])
    kept = load_file(best / "pytorch_lora_weights.safetensors")
    saved = load_file(tmp_path / "out" / f"checkpoint-{expected}" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    # A run that goes back to an earlier step finds it again, and puts the first one aside.
    back = str(tmp_path / "out" / "checkpoint-1")
    build(**options, resume_from_checkpoint=back).train()
    assert (tmp_path / "out" / "abandoned-1" / "best" / "metrics.json").is_file()
    assert json.loads((best / "metrics.json").read_text()) == report


def test_what_is_hacked_is_never_the_best(build: Callable[..., PRFLTrainer], tmp_path: Path) -> None:
    build(on_hacking="keep_best", learning_rate=0.2, validation_steps=2).train()
    base, *lines = metric_lines(tmp_path / "out")
    assert {line["verdict"] for line in lines} == {"hacked"}
    assert max(line["validation/monitor_reward"] for line in lines) > base["validation/monitor_reward"]
    assert not (tmp_path / "out" / "best").exists()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_without_held_out_models_drift_and_statistics_are_measured(
    build: Callable[..., PRFLTrainer], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    # The validation rows have no latents, so the training clips are the real ones.
    write_latents(tmp_path / "prompts", 3, prompts_only=True)
    options = {"monitor_reward_models": [], "on_hacking": "warn", "max_train_steps": 1}
    build(validation_dataset=str(tmp_path / "prompts"), **options).train()
    _, line = metric_lines(tmp_path / "out")
    assert {"validation/sample_drift", "validation/velocity_drift", "validation/latents_distance"} <= set(line)
    assert not any("monitor_reward" in name or "gap" in name for name in line)
    training = WanRewardModel.from_pretrained(tmp_path / "reward").eval()
    rewards = score_rows(training, validation_rows(tmp_path / "train"), [300, 900], seed=1).sigmoid()
    assert line["validation/real_reward"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    # The reward model may know the labels of the training clips.
    assert "validation/calibration_error" not in line


def test_without_latents_nothing_is_compared_with_real_clips(
    build: Callable[..., PRFLTrainer],
    tmp_path: Path,
    write_latents: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = str(write_latents(tmp_path / "prompts", 3, prompts_only=True))
    build(train_dataset=prompts, validation_dataset=prompts, update_schedule="reward", max_train_steps=1).train()
    assert caplog.text.count("the samples are not compared with real clips") == 1
    for line in metric_lines(tmp_path / "out"):
        assert not any("real" in name or "latents_d" in name or "calibration" in name for name in line)
    build(
        train_dataset=prompts, validation_dataset=prompts, update_schedule="reward", max_train_steps=2,
        resume_from_checkpoint="latest",
    ).train()  # fmt: skip
    assert [line["step"] for line in metric_lines(tmp_path / "out")] == [0, 1, 2]


def test_clips_without_a_label_have_no_calibration_error(
    build: Callable[..., PRFLTrainer], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    """A label of half the task is none."""
    write_latents(tmp_path / "validation", 3, overrides={row: {"human_quality": None} for row in range(3)})
    found = build().measure_start()
    assert {"real_reward", "reward_above_real"} <= set(found)
    assert "calibration_error" not in found


def test_options_that_make_no_sense_are_refused(
    build: Callable[..., PRFLTrainer], tmp_path: Path, held_out: list[str], pipeline_dir: Path, tiny_vae: str
) -> None:
    for options, words in (
        ({"validation_dataset": None}, "`monitor_reward_models` must be left out without `validation_dataset`"),
        (
            {"monitor_reward_models": [str(tmp_path / "reward")]},
            "all different, and none of those that are trained on",
        ),
        # Another spelling of the same folder.
        ({"monitor_reward_models": [f"{tmp_path}/reward/"]}, "all different, and none of those that are trained on"),
        (
            {"reward_model": None, "reward_models": held_out[:1], "monitor_reward_models": held_out[:1]},
            "all different, and none of those that are trained on",
        ),
        ({"monitor_reward_models": held_out[:1] * 2}, "all different"),
        ({"monitor_reward_models": [], "on_hacking": "keep_best"}, "`on_hacking` must be warn or stop without"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint="other")
    model.save_pretrained(tmp_path / "other_vae")
    with pytest.raises(ValueError, match="another VAE than the latents that the monitor's reward model .*other_vae"):
        build(monitor_reward_models=[str(tmp_path / "other_vae")])
    model.register_to_config(base_num_layers=40, vae_fingerprint=tiny_vae)
    model.save_pretrained(tmp_path / "other_base")
    with pytest.raises(ValueError, match="`monitor_reward_models` .*other_base.* does not fit the generator"):
        build(monitor_reward_models=[str(tmp_path / "other_base")])


def test_real_clips_are_found_among_prompts(tmp_path: Path, write_latents: Callable[..., Path]) -> None:
    """One row with latents in the middle of 80 without, which 64 places spread over all rows would miss."""
    prompts = load_latent_dataset(str(write_latents(tmp_path / "prompts", 40, prompts_only=True)))
    clip = load_latent_dataset(str(write_latents(tmp_path / "clip", 1)))
    validation = concatenate_datasets([prompts, clip, prompts])
    assert rows_with_latents(validation) == [40]
    datasets = cast(PRFLDatasets, SimpleNamespace(validation=validation, clips=None))
    found, labels = find_real_clips(datasets, ["motion_quality"])
    assert found is not None
    assert found["id"] == clip["id"]
    assert len(labels) == 1
