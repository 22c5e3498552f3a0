import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open

from hy_prfl.formats.checkpoints import (
    PRFL_RESULTS,
    REWARD_RESULTS,
    STATE_FILE,
    abandon,
    check_files,
    find_checkpoint,
    list_checkpoints,
    read_state,
)
from hy_prfl.formats.model_files import merge_adapter, read_lora, save_lora
from hy_prfl.formats.training_state import load_checkpoint, save_checkpoint


RESULTS = (*REWARD_RESULTS, *PRFL_RESULTS)


def save(accelerator: Accelerator, folder: Path, step: int, total_limit: int | None = None) -> Path:
    return save_checkpoint(
        accelerator, folder, step=step, state={"global_step": step}, total_limit=total_limit,
        write_config=lambda path: (path / "config.yaml").write_text("a: 1"),
    )  # fmt: skip


def test_saving_and_loading_restores_model_optimizer_and_random_state(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = save(accelerator, tmp_path, 7)
    expected = [value.clone() for value in model.parameters()], torch.rand(3)
    optimizer.step()
    load_checkpoint(accelerator, checkpoint)
    assert read_state(checkpoint) == {"global_step": 7}
    assert all(map(torch.equal, model.parameters(), expected[0]))
    assert torch.equal(torch.rand(3), expected[1])
    assert (checkpoint / "config.yaml").read_text() == "a: 1"


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for step in (8, 9, 10):
        save(accelerator, tmp_path, step, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("exists", [False, True])
def test_latest_without_a_checkpoint_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, exists: bool) -> None:
    """A mistyped `output_dir` is empty too. Commands show messages of this level."""
    folder = tmp_path if exists else tmp_path / "none"
    with caplog.at_level(logging.INFO, logger="hy_prfl"):
        assert find_checkpoint(folder, "latest") is None
    assert f"There is no complete checkpoint in {folder}: the run starts from the beginning." in caplog.text


def test_what_is_beyond_the_limit_can_go_before_anything_is_written(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    seen = []

    def write_config(path: Path) -> None:
        seen.append([checkpoint.name for checkpoint in list_checkpoints(tmp_path)])

    for step in (8, 9, 10):
        save_checkpoint(
            accelerator, tmp_path, step=step, state={"global_step": step}, total_limit=2, delete_first=True,
            write_config=write_config,
        )  # fmt: skip
    assert seen == [[], ["checkpoint-8"], ["checkpoint-9"]]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    save(Accelerator(cpu=True), tmp_path, 4)
    (tmp_path / ".checkpoint-8.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-8").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8 is not a complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-8"))
    with pytest.raises(FileNotFoundError, match=r"is not a complete checkpoint: .* Did you mean .*checkpoint-8\?"):
        find_checkpoint(tmp_path, str(tmp_path))


def test_latest_passes_over_a_folder_that_was_half_copied_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(Accelerator(cpu=True), tmp_path, 4)
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "optimizer.bin").write_bytes(b"half")
    (tmp_path / "checkpoint-9").write_text("a file")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"
    assert "checkpoint-8 is not a complete checkpoint and is skipped" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"checkpoint-4/trainer_state\.json: not valid JSON"),
        ("[]", r"checkpoint-4/trainer_state\.json: expected a mapping with `global_step`"),
        ('{"global_step": 6}', r"checkpoint-4: its .* has step 6"),
    ],
)
@pytest.mark.parametrize("way", ["latest", "path"])
def test_a_checkpoint_that_contradicts_itself(tmp_path: Path, text: str, message: str, way: str) -> None:
    checkpoint = save(Accelerator(cpu=True), tmp_path, 4)
    (checkpoint / STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_checkpoint(tmp_path, "latest" if way == "latest" else str(checkpoint))


def test_a_checkpoint_that_was_copied_by_halves(tmp_path: Path) -> None:
    checkpoint = save(Accelerator(cpu=True), tmp_path, 4)
    check_files(checkpoint, with_optimizer=True)
    states = checkpoint / "random_states_0.pkl"
    size = states.stat().st_size
    states.write_bytes(states.read_bytes()[:10])
    with pytest.raises(ValueError, match=rf"checkpoint-4 is not complete: 'random_states_0.pkl' has 10 .* {size}"):
        check_files(checkpoint, with_optimizer=True)
    states.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 is not complete: 'random_states_0.pkl' is missing"):
        check_files(checkpoint, with_optimizer=True)
    check_files(checkpoint, with_optimizer=False)


def test_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    other = save(accelerator, tmp_path / "other", 2)
    own = save(accelerator, tmp_path / "run", 6)
    assert find_checkpoint(tmp_path / "new", str(other)) == other
    with pytest.raises(ValueError, match=r"other/checkpoint-2 is not in .*run.* which already holds checkpoint-6"):
        find_checkpoint(tmp_path / "run", str(other))
    # The same folder by another name is the run's own.
    assert find_checkpoint(tmp_path / "run", str(tmp_path / "other" / ".." / "run" / "checkpoint-6" / ".")).samefile(
        own
    )


class TestGoingBack:
    """A run that goes on from an earlier step than its last."""

    def names(self, folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("checkpoint-*")}

    def test_what_was_just_written_is_latest_and_stays(self, tmp_path: Path) -> None:
        accelerator = Accelerator(cpu=True)
        for step in (2, 4, 6):
            save(accelerator, tmp_path, step)
        assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
        assert abandon(tmp_path, 2, RESULTS) == tmp_path / "abandoned-1"
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
        assert self.names(tmp_path) == {"checkpoint-2", "abandoned-1/checkpoint-4", "abandoned-1/checkpoint-6"}
        save(accelerator, tmp_path, 4, total_limit=1)
        assert self.names(tmp_path) == {"checkpoint-4"}
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"

    def test_the_limit_deletes_what_is_abandoned_first(self, tmp_path: Path) -> None:
        accelerator = Accelerator(cpu=True)
        for step in (2, 9, 10):
            save(accelerator, tmp_path, step)
        abandon(tmp_path, 2, RESULTS)
        save(accelerator, tmp_path, 4, total_limit=3)
        assert self.names(tmp_path) == {"abandoned-1/checkpoint-10", "checkpoint-2", "checkpoint-4"}
        save(accelerator, tmp_path, 6)
        abandon(tmp_path, 4, RESULTS)
        save(accelerator, tmp_path, 6, total_limit=4)
        assert self.names(tmp_path) == {"abandoned-2/checkpoint-6", "checkpoint-2", "checkpoint-4", "checkpoint-6"}
        save(accelerator, tmp_path, 8, total_limit=2)
        assert self.names(tmp_path) == {"checkpoint-6", "checkpoint-8"}

    def test_even_beside_a_later_step_what_was_just_written_stays(self, tmp_path: Path) -> None:
        accelerator = Accelerator(cpu=True)
        save(accelerator, tmp_path, 6)
        save(accelerator, tmp_path, 4, total_limit=1)
        assert self.names(tmp_path) == {"checkpoint-4"}

    def test_everything_of_later_steps_goes(self, tmp_path: Path) -> None:
        for step in (2, 4):
            save(Accelerator(cpu=True), tmp_path, step)
        (tmp_path / "checkpoint-7").mkdir()
        for folder, step in (("best", 3), ("validation/step-2", 2), ("validation/step-4", 4), ("transformer", 4)):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "metrics.json").write_text(json.dumps({"global_step": step}))
        (tmp_path / "run.json").write_text(json.dumps([{"seed": 0, "finished_step": 4}]))
        lines = [json.dumps({"step": step, "train/loss": 0.5}) + "\n" for step in (1, 2, 3, 4)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        folder = abandon(tmp_path, 2, RESULTS)
        assert folder is not None
        moved = {"checkpoint-4", "checkpoint-7", "best", "validation", "transformer", "metrics.jsonl"}
        assert {path.name for path in folder.iterdir()} == moved
        assert {path.name for path in (folder / "validation").iterdir()} == {"step-4"}
        assert {path.name for path in (tmp_path / "validation").iterdir()} == {"step-2"}
        assert (folder / "metrics.jsonl").read_text() == "".join(lines[2:])
        assert not (tmp_path / "best").exists()
        assert not (tmp_path / "transformer").exists()
        assert abandon(tmp_path, 2, RESULTS) is None

    def test_what_belongs_to_the_step_or_to_earlier_ones_stays(self, tmp_path: Path) -> None:
        save(Accelerator(cpu=True), tmp_path, 4)
        for folder, step in (("best", 3), ("validation/step-4", 4), ("reward_model", 4)):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "metrics.json").write_text(json.dumps({"global_step": step}))
        (tmp_path / "run.json").write_text(json.dumps([{"seed": 0, "finished_step": 4}, {"seed": 0}]))
        # Of steps after the last checkpoint, which are done anew.
        (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step":')
        assert abandon(tmp_path, 4, RESULTS) is None
        assert {path.name for path in tmp_path.iterdir()} == {
            "checkpoint-4", "best", "validation", "reward_model", "run.json", "metrics.jsonl",
        }  # fmt: skip

    def test_results_of_the_other_trainer_stay(self, tmp_path: Path) -> None:
        """A reward model may lie where a generator is to be trained with it."""
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / "metrics.json").write_text('{"global_step": 3}')
        (tmp_path / "reward_model").mkdir()
        assert abandon(tmp_path, 0, PRFL_RESULTS) is None
        assert abandon(tmp_path, 0, REWARD_RESULTS) == tmp_path / "abandoned-1"
        assert {path.name for path in (tmp_path / "abandoned-1").iterdir()} == {"best", "reward_model"}

    def test_a_run_that_was_killed_while_it_moved_them(self, tmp_path: Path) -> None:
        accelerator = Accelerator(cpu=True)
        for step in (2, 4, 6):
            save(accelerator, tmp_path, step)
        abandon(tmp_path, 2, RESULTS)
        # As if it had died after the first of two renames.
        (tmp_path / "abandoned-1" / "checkpoint-4").rename(tmp_path / "checkpoint-4")
        (tmp_path / ".abandoning.json").write_text(
            json.dumps({"folder": "abandoned-1", "names": ["checkpoint-4", "checkpoint-6"]})
        )
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"
        assert self.names(tmp_path) == {"checkpoint-2", "abandoned-1/checkpoint-4", "abandoned-1/checkpoint-6"}
        assert not (tmp_path / ".abandoning.json").exists()


def test_what_to_resume(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "latest") is None
    checkpoint = save(Accelerator(cpu=True), tmp_path, 3)
    assert find_checkpoint(tmp_path, str(checkpoint)) == checkpoint
    with pytest.raises(ValueError, match="`output_dir`.*already holds checkpoint-3"):
        find_checkpoint(tmp_path, None)


def test_failure_while_saving_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    save(accelerator, tmp_path, 3)

    def fail(path: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(accelerator, tmp_path, step=6, state={}, write_config=fail, total_limit=1)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"
    assert json.loads((tmp_path / "checkpoint-3" / STATE_FILE).read_text()) == {"global_step": 3}
    save(accelerator, tmp_path, 6)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-6"


def test_a_swap_that_was_cut_off_does_not_hide_the_newest(tmp_path: Path) -> None:
    save(Accelerator(cpu=True), tmp_path, 3)
    (tmp_path / "checkpoint-3").rename(tmp_path / ".checkpoint-3.old")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"


@pytest.fixture
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value)
    return model


def lora_weights(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in transformer.state_dict().items() if "lora_" in name}


def test_adapter_round_trip_with_its_metadata(transformer: WanTransformer3DModel, tmp_path: Path) -> None:
    save_lora(transformer, lora_weights(transformer), tmp_path / "pytorch_lora_weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (2, 6)
    saved = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    expected = lora_weights(transformer)
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_a_merged_adapter_computes_the_same(transformer: WanTransformer3DModel) -> None:
    merged = WanTransformer3DModel.from_config(transformer.config)
    merged.load_state_dict(merge_adapter(transformer, transformer.state_dict()))
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 32),
    }
    with torch.no_grad():
        expected = transformer.eval()(**inputs).sample
        transformer.disable_adapters()
        assert not torch.allclose(transformer(**inputs).sample, expected, atol=1e-3)
        torch.testing.assert_close(merged.eval()(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
