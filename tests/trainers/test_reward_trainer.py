import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import table_to_rows, unpack_tensor
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.trainers.base import Trainer
from hy_prfl.trainers.reward_trainer import NOISE, RewardTrainer


@pytest.fixture
def build(
    tmp_path: Path, write_latents: Callable[..., Path], reward_builder: Callable[..., RewardTrainer]
) -> Callable[..., RewardTrainer]:
    """Function that builds a trainer on 8 rows, with options on top of quick ones."""
    if not (tmp_path / "train").exists():
        write_latents(tmp_path / "train", 8)
        write_latents(tmp_path / "validation", 6, seed=1)

    return reward_builder


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_what_trains_moves_and_what_is_frozen_does_not(build: Callable[..., RewardTrainer], loss: str) -> None:
    trainer = build(loss=loss)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        frozen = name.startswith(("patch_embedding", "condition_embedder"))
        # A constant added to both logits cancels in their difference: what gradient there is, is rounding.
        if not (loss == "bt" and name == "head.linear_3.bias"):
            assert torch.equal(value, before[name]) == frozen, name


def test_frozen_blocks_leave_a_probe(build: Callable[..., RewardTrainer]) -> None:
    trainer = build(freeze_blocks=True)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    moved = {name for name, value in trainer.unwrapped.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(("pooler", "head"))}


def test_two_learning_rates(build: Callable[..., RewardTrainer]) -> None:
    trainer = build(learning_rate=1e-4, head_learning_rate=1e-2, max_train_steps=1, adam_weight_decay=0.0)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        if value.requires_grad and name.endswith("weight"):
            # The first step of Adam is the learning rate wherever the gradient is not tiny.
            largest = (value - before[name]).abs().max().item()
            assert largest == pytest.approx(1e-4 if name.startswith("blocks") else 1e-2, rel=0.05), name


def test_one_update_equals_the_same_arithmetic_written_out(build: Callable[..., RewardTrainer]) -> None:
    """Accumulation, clipping, sigma, noise and AdamW against a loop in plain torch."""
    trainer = build(gradient_accumulation_steps=2, train_batch_size=2, max_train_steps=1, flow_shift=3.0)
    model = WanRewardModel.from_transformer(WanTransformer3DModel.from_config(trainer.unwrapped.config), num_layers=2)
    model.load_state_dict(trainer.unwrapped.state_dict())
    model.freeze_embeddings()
    rows = table_to_rows(load_latent_dataset(trainer.config.train_dataset[0])[:])
    order = iter(trainer.datasets.sampler())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for micro_step in range(2):
        chosen = [rows[index] for index in next(order)]
        latents = torch.tensor(np.stack([unpack_tensor(row, "latents").astype(np.float32) for row in chosen]))
        labels = torch.tensor([float(row["physics_quality"]) for row in chosen])
        prompts = [torch.tensor(unpack_tensor(row, "prompt_embeds").astype(np.float32)) for row in chosen]
        prompt_embeds = torch.stack([F.pad(prompt, (0, 0, 0, 16 - len(prompt))) for prompt in prompts])
        generators = trainer.generators(NOISE, micro_step, 2)
        u = torch.tensor([1 - torch.randint(1000, (1,), generator=each).item() / 1000 for each in generators])
        sigmas = 3 * u / (1 + 2 * u)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in generators])
        weight = sigmas.view(-1, 1, 1, 1, 1)
        logits = model((1 - weight) * latents + weight * noise, 1000 * sigmas, prompt_embeds).logits
        reward = logits.sigmoid()
        loss = -(labels * reward.log() + (1 - labels) * (1 - reward).log()).mean()
        (loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.01).step()

    trainer.train()
    for name, value in trainer.unwrapped.named_parameters():
        # A bias of all keys shifts every attention score alike: its gradient is rounding noise, which Adam blows up.
        if name != "pooler.to_k.bias":
            torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-4, atol=2e-6, msg=name)


def test_training_learns_labels_that_can_be_learnt(build: Callable[..., RewardTrainer], tmp_path: Path) -> None:
    trainer = build(
        max_train_steps=30, validation_dataset=str(tmp_path / "validation"), validation_steps=30, flow_shift=1.0
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    validation = next(line for line in lines if "validation/auc" in line)
    assert validation["validation/accuracy/t100"] == 1.0
    assert validation["validation/auc/t300"] == 1.0


@pytest.mark.parametrize("loss", ["bce", "bt"])
def test_resuming_equals_never_having_stopped(
    build: Callable[..., RewardTrainer], interrupt_after: Callable[[Trainer, int], None], tmp_path: Path, loss: str
) -> None:
    options = {
        "loss": loss,
        "train_batch_size": 3 if loss == "bce" else 2,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 2,
        "lr_scheduler": "linear",
        "validation_dataset": str(tmp_path / "validation"),
        "validation_steps": 3,
    }
    whole = build(max_train_steps=5, output_dir=str(tmp_path / "whole"), **options)
    whole.train()

    parts = tmp_path / "parts"
    first = build(max_train_steps=5, output_dir=str(parts), **options)
    first.interrupted = False
    interrupt_after(first, 3)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build(max_train_steps=5, output_dir=str(parts), resume_from_checkpoint="latest", **options)
    second.train()

    for (name, value), other in zip(
        whole.unwrapped.state_dict().items(), second.unwrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    assert whole.best_metric == second.best_metric


def test_the_result_loads_and_scores_as_trained(
    build: Callable[..., RewardTrainer], tmp_path: Path, tiny_vae: str
) -> None:
    trainer = build(validation_dataset=str(tmp_path / "validation"), validation_steps=1)
    trainer.train()
    inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([100.0, 900.0]), torch.randn(2, 16, 32)
    loaded = WanRewardModel.from_pretrained(tmp_path / "out" / "reward_model")
    torch.testing.assert_close(loaded(*inputs).logits, trainer.unwrapped.eval()(*inputs).logits)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in trainer.unwrapped.state_dict().items())
    assert loaded.config.task == "motion_quality"
    assert loaded.config.vae_fingerprint == tiny_vae
    best = json.loads((tmp_path / "out" / "best" / "metrics.json").read_text())
    assert best["accuracy"] == trainer.best_metric
    WanRewardModel.from_pretrained(tmp_path / "out" / "best")


def test_starting_from_a_reward_model(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build().train()
    second = build(
        output_dir=str(tmp_path / "second"), reward_model=str(tmp_path / "out" / "reward_model"), task="human_quality"
    )
    saved = WanRewardModel.from_pretrained(tmp_path / "out" / "reward_model").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in second.unwrapped.state_dict().items())
    assert second.unwrapped.config.task == "human_quality"
    source = tmp_path / "out" / "reward_model"
    assert f"{source} was trained for 'motion_quality'; it goes on with labels for 'human_quality'" in caplog.text


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing_blocks": 1}, {"offload_activations": True, "attention_backend": "native"}]
)
def test_gradient_checkpointing_changes_nothing(
    build: Callable[..., RewardTrainer], tmp_path: Path, options: dict[str, Any]
) -> None:
    plain = build(output_dir=str(tmp_path / "plain"))
    plain.train()
    checkpointed = build(output_dir=str(tmp_path / "checkpointed"), gradient_checkpointing=True, **options)
    checkpointed.train()
    for value, other in zip(plain.unwrapped.parameters(), checkpointed.unwrapped.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)


def test_forward_only_attention_kernels_are_refused(build: Callable[..., RewardTrainer]) -> None:
    with pytest.raises(ValueError, match="`attention_backend` must have a backward pass, and 'sage' has none"):
        build(attention_backend="sage")


@pytest.fixture
def spoilt(tmp_path: Path, write_latents: Callable[..., Path]) -> str:
    """Dataset of 8 rows of which clip-5 is not finite; `pack_tensor` would not write such a row."""
    broken = {5: {"latents": np.full(16 * 2 * 4 * 4, np.nan, np.float16)}}
    return str(write_latents(tmp_path / "spoilt", 8, overrides=broken))


def test_an_update_with_a_loss_that_is_not_finite_is_left_out(
    build: Callable[..., RewardTrainer], spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(train_dataset=spoilt, gradient_accumulation_steps=2, train_batch_size=2, max_train_steps=4)
    seen = [snapshot(trainer.unwrapped)]
    original = trainer.train_step

    def watch() -> dict[str, torch.Tensor]:
        metrics = original()
        seen.append(snapshot(trainer.unwrapped))
        return metrics

    trainer.train_step = watch  # type: ignore[method-assign]
    trainer.train()
    changed = [not torch.equal(seen[i]["head.linear_3.weight"], seen[i + 1]["head.linear_3.weight"]) for i in range(4)]
    # 4 updates are two epochs: the row comes once in each.
    assert sum(changed[:2]) == sum(changed[2:]) == 1
    assert all(value.isfinite().all() for value in seen[-1].values())
    reports = [record.getMessage() for record in caplog.records if "update left out" in record.getMessage()]
    assert len(reports) == 2
    for report, step in zip(reports, [index for index, moved in enumerate(changed) if not moved], strict=True):
        assert f"Step {step}: a loss is not finite" in report
        assert "rank 0: loss nan" in report
        assert "clip-5" in report


def test_too_many_updates_left_out_stop_the_run(build: Callable[..., RewardTrainer], spoilt: str) -> None:
    with pytest.raises(FloatingPointError, match=r"number 2 of this run.*clip-5.*`max_skipped_updates` is 1"):
        build(train_dataset=spoilt, max_train_steps=8, max_skipped_updates=1).train()


def test_the_count_of_updates_left_out_survives_a_restart(build: Callable[..., RewardTrainer], spoilt: str) -> None:
    build(train_dataset=spoilt, max_train_steps=2).train()
    with pytest.raises(FloatingPointError, match="number 2 of this run"):
        build(train_dataset=spoilt, max_train_steps=4, max_skipped_updates=1, resume_from_checkpoint="latest").train()


def test_adapter_trains_and_the_result_is_an_ordinary_reward_model(
    build: Callable[..., RewardTrainer], tmp_path: Path
) -> None:
    trainer = build(lora_rank=2, lora_alpha=8.0, max_train_steps=3)
    before = snapshot(trainer.unwrapped)
    trainer.train()
    moved = {name for name, value in trainer.unwrapped.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith(("pooler", "head"))}
    assert not any("pooler" in name for name in before if "lora_" in name)

    plain = WanRewardModel.from_pretrained(str(tmp_path / "out" / "reward_model"))
    inputs = {
        "hidden_states": torch.randn(2, 16, 2, 4, 4),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 3, 32),
    }
    with torch.no_grad():
        expected = trainer.unwrapped.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        for layer in trainer.unwrapped.modules():
            if hasattr(layer, "scaling"):
                assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("options", [{"lora_rank": 2, "lora_dropout": 0.3}])
def test_resuming_an_adapter_equals_never_having_stopped(
    build: Callable[..., RewardTrainer], tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = build(max_train_steps=4, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    build(max_train_steps=2, **options).train()
    second = build(max_train_steps=4, resume_from_checkpoint="latest", **options)
    second.train()
    expected = snapshot(whole.unwrapped)
    assert all(torch.equal(value, expected[name]) for name, value in second.unwrapped.named_parameters())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_averaged_weights_are_validated_and_saved(
    build: Callable[..., RewardTrainer], tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = build(
        use_ema=True, ema_decay=0.5, max_train_steps=3, validation_dataset=str(tmp_path / "validation"), **options
    )
    averages = snapshot(trainer.unwrapped)
    original, evaluator = trainer.train_step, trainer.evaluator
    assert evaluator is not None
    validated: list[dict[str, torch.Tensor]] = []

    def step_and_average() -> dict[str, torch.Tensor]:
        metrics = original()
        assert trainer.average is not None
        decay = trainer.average.ema.get_decay(trainer.average.ema.optimization_step)
        for name, value in trainer.unwrapped.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * value.detach()
        return metrics

    def evaluate(model: torch.nn.Module, accelerator: Any) -> dict[str, float]:
        validated.append(snapshot(trainer.unwrapped))
        return evaluator(model, accelerator)

    trainer.train_step = step_and_average  # type: ignore[method-assign]
    trainer.evaluator = evaluate  # type: ignore[assignment]
    trainer.train()
    for name, value in averages.items():
        torch.testing.assert_close(validated[-1][name], value, rtol=1e-5, atol=1e-6)
        trains = trainer.unwrapped.get_parameter(name).requires_grad
        assert torch.equal(trainer.unwrapped.get_parameter(name), validated[-1][name]) != trains, name
    # The result and the best model are the average, with the adapter merged in.
    with torch.no_grad():
        for name, value in averages.items():
            trainer.unwrapped.get_parameter(name).copy_(value)
        inputs = torch.randn(2, 16, 2, 4, 4), torch.tensor([300.0, 900.0]), torch.randn(2, 3, 32)
        expected = trainer.unwrapped.eval()(*inputs).logits
        for folder in ("reward_model", "best"):
            saved = WanRewardModel.from_pretrained(str(tmp_path / "out" / folder))
            torch.testing.assert_close(saved(*inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"freeze_blocks": True}])
def test_resuming_with_an_average_equals_never_having_stopped(
    build: Callable[..., RewardTrainer], tmp_path: Path, options: dict[str, Any]
) -> None:
    options = options | {"use_ema": True, "ema_decay": 0.9}
    whole = build(max_train_steps=4, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    build(max_train_steps=2, **options).train()
    second = build(max_train_steps=4, resume_from_checkpoint="latest", **options)
    second.train()
    assert whole.average is not None
    assert second.average is not None
    assert second.average.num_averaged == whole.average.num_averaged == 4
    assert all(map(torch.equal, whole.average.ema.shadow_params, second.average.ema.shadow_params))
    expected = snapshot(whole.unwrapped)
    assert all(torch.equal(value, expected[name]) for name, value in second.unwrapped.named_parameters())
    results = [WanRewardModel.from_pretrained(str(tmp_path / run / "reward_model")) for run in ("whole", "out")]
    for one, other in zip(*(result.parameters() for result in results), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("allow", [True, False, None])
def test_tf32_is_torchs_own_switch(build: Callable[..., RewardTrainer], allow: bool | None) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    assert not before
    try:
        build(allow_tf32=allow)
        assert torch.backends.cuda.matmul.allow_tf32 == bool(allow)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 4}, "has only 3 blocks"),
        ({"task": "blur_quality"}, "no row has a label for the task 'blur_quality'"),
        ({"train_dataset": "nowhere/data"}, "nowhere/data"),
        ({"report_to": ["tensorbored"]}, "`report_to` must be .*tensorboard.*got 'tensorbored'"),
    ],
)
def test_bad_input_is_refused(build: Callable[..., RewardTrainer], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(**options)


def test_datasets_that_do_not_fit_are_refused(
    build: Callable[..., RewardTrainer], tmp_path: Path, write_latents: Callable[..., Path]
) -> None:
    empty = write_latents(tmp_path / "prompts", 4, prompts_only=True)
    with pytest.raises(ValueError, match=r"4 of 4 rows have no latents"):
        build(train_dataset=str(empty))
    other_vae = write_latents(tmp_path / "other", 4, overrides={i: {"vae_fingerprint": "other"} for i in range(4)})
    with pytest.raises(ValueError, match="other: of another VAE than the pipeline: `vae_fingerprint` other"):
        build(validation_dataset=str(other_vae))
    mixed = write_latents(tmp_path / "mixed", 4, overrides={1: {"vae_fingerprint": "other"}})
    with pytest.raises(ValueError, match="same `vae_fingerprint`"):
        build(train_dataset=str(mixed))
    image = write_latents(tmp_path / "image", 4, image_to_video=True)
    with pytest.raises(ValueError, match="image_embeds_shape"):
        build(train_dataset=str(image))


def test_another_number_of_processes_and_changed_options(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build().train()
    build(resume_from_checkpoint="latest", max_train_steps=3).train()
    assert "`max_train_steps` was 2 before the checkpoint and is 3 now" in caplog.text
    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"num_processes": 8, "num_replicas": 8}))
    build(resume_from_checkpoint="latest", max_train_steps=4).train()
    assert "A global micro-batch was 8 x 4 clips and is 1 x 4" in caplog.text
    assert "dropout draws other numbers" in caplog.text
    assert "moments of AdamW" not in caplog.text


def test_another_engine_goes_on_from_the_weights_with_a_new_optimizer(
    build: Callable[..., RewardTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"lr_scheduler": "linear", "max_train_steps": 4, "checkpointing_steps": 2}
    build(**options).train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"engine": "ZeRO-3"}))
    # Nothing but weights and schedule can be read, nothing else is needed.
    for name in ("optimizer.bin", "random_states_0.pkl"):
        (checkpoint / name).unlink()
    trainer = build(**options, resume_from_checkpoint="latest")
    trainer._start_run()
    saved = WanRewardModel.from_pretrained(str(checkpoint / "reward_model"))
    expected = dict(saved.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in trainer.unwrapped.named_parameters())
    assert [group["lr"] for group in trainer.updates.optimizer.param_groups] == [0.5e-3, 0.5e-3]
    assert "the moments of AdamW start from zero" in caplog.text
    trainer.start_streams()
    trainer.train_step()


def test_a_finished_folder_is_not_overwritten(build: Callable[..., RewardTrainer]) -> None:
    build().train()
    with pytest.raises(ValueError, match="already holds checkpoint-2"):
        build()


def test_image_to_video(
    build: Callable[..., RewardTrainer], tmp_path: Path, i2v_pipeline_dir: Path, write_latents: Callable[..., Path]
) -> None:
    dataset = write_latents(tmp_path / "image", 4, image_to_video=True)
    trainer = build(
        pretrained_model_name_or_path=str(i2v_pipeline_dir),
        train_dataset=str(dataset),
        validation_dataset=str(dataset),
    )
    before = snapshot(trainer.unwrapped)
    trainer.train()
    moved = {name for name, value in trainer.unwrapped.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(("patch_embedding", "condition_embedder"))}
