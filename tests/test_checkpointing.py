import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open

from hy_prfl.checkpointing import (
    STATE_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    merge_adapter,
    read_lora,
    read_state,
    save_checkpoint,
    save_lora,
)


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


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    save(Accelerator(cpu=True), tmp_path, 4)
    (tmp_path / ".checkpoint-8.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-8").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8 is not a complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-8"))


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
