"""Loading, reading and writing weights. Training with sharded weights is tested in tests/distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import WanTransformer3DModel

from hy_prfl.runtime.sharding import Masters, fill_weights, full_state_dict


ROOT = Path(__file__).parents[2]
# One rank of DeepSpeed on the CPU. The meta device stands for another device that the engine is on.
ZERO3 = """
import json, sys
import deepspeed, torch
from diffusers import WanTransformer3DModel
from hy_prfl.runtime.sharding import shard_for_zero3
deepspeed.init_distributed("gloo", verbose=False)
model = WanTransformer3DModel.from_pretrained(sys.argv[1], subfolder="transformer")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
shard_for_zero3(model, config, torch.device("meta"))
assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
print(json.dumps({name: buffer.device.type for name, buffer in model.named_buffers()}))
torch.distributed.destroy_process_group()
"""

# Writes zeros and the old weights again into a model under ZeRO-3 with the settings for GPUs, and records its outputs.
WRITING = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from hy_prfl.runtime.distributed import build_accelerator
from hy_prfl.runtime.sharding import Masters, shard_for_zero3
accelerator = build_accelerator(gradient_accumulation_steps=1, train_batch_size=1, log_with=[], output_dir=Path("."))
settings = accelerator.state.deepspeed_plugin.deepspeed_config
config = {name: settings[name] for name in ("zero_optimization", "bf16", "train_micro_batch_size_per_gpu")}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 400), nn.LayerNorm(400), nn.Linear(400, 400), nn.Linear(400, 1)).bfloat16()
shard_for_zero3(model, config, accelerator.device)
wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
inputs = torch.ones(1, 8, dtype=torch.bfloat16)
accelerator.backward(wrapped(inputs).float().sum())
optimizer.step()
outputs = []
def compute():
    with torch.no_grad():
        outputs.append(wrapped(inputs).float().item())
compute()
masters = Masters(dict(model.named_parameters()), optimizer)
kept = [value.detach().clone() for value in masters.values()]
masters.write([torch.zeros_like(value) for value in kept])
compute()
masters.write(kept)
compute()
stage3 = type(next(model.parameters())._z3_optimizer)
stage3.get_hp_param_device = lambda self, parameter: torch.device("meta")
if accelerator.is_main_process:
    record = {"outputs": outputs, "devices": sorted({value.device.type for value in masters.values()})}
    Path(sys.argv[1]).write_text(json.dumps(record))
"""


@pytest.fixture
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")


@pytest.fixture
def empty(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    with init_empty_weights(include_buffers=False):
        return WanTransformer3DModel.from_config(transformer.config)


def test_filled_weights_are_copies_in_the_wanted_types(
    transformer: WanTransformer3DModel, empty: WanTransformer3DModel
) -> None:
    weights = transformer.state_dict()
    fill_weights(empty, weights, dtype=torch.bfloat16, keep_in_fp32=["norm2", "scale_shift_table"])
    for name, value in empty.named_parameters():
        kept = "norm2" in name or "scale_shift_table" in name
        assert value.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(value, weights[name].to(value.dtype))
        assert value.data_ptr() != weights[name].data_ptr()
    assert not any(buffer.is_meta for buffer in empty.buffers())


def test_each_block_is_split_once_it_is_whole_and_the_model_last(
    transformer: WanTransformer3DModel, empty: WanTransformer3DModel
) -> None:
    whole = []

    def shard(module: torch.nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in module.parameters())
        whole.append(module)
        # No block is filled before the previous one was sharded.
        filled = [not next(block.parameters()).is_meta for block in empty.blocks]
        assert filled == [index < len(whole) for index in range(len(filled))]

    fill_weights(empty, transformer.state_dict(), dtype=torch.float32, shard=shard)
    assert whole == [*empty.blocks, empty]


@pytest.mark.launch
def test_buffers_of_a_model_in_shards_are_on_the_engines_device(pipeline_dir: Path) -> None:
    """Found on a GPU: rotary embeddings stayed on the CPU, and the first forward failed."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | own
    command = [sys.executable, "-c", ZERO3, str(pipeline_dir)]
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    devices = json.loads(finished.stdout.splitlines()[-1])
    assert devices == {"rope.freqs_cos": "meta", "rope.freqs_sin": "meta"}


@pytest.mark.launch
def test_weights_written_under_zero3_are_those_it_computes_with(tmp_path: Path) -> None:
    """DeepSpeed keeps small parameters whole between calls, and others that it will need soon."""
    program, results = tmp_path / "program.py", tmp_path / "results.json"
    program.write_text(WRITING)
    engine = ["accelerate_configs/zero3_cpu.yaml", "--deepspeed_config_file", "ds_configs/zero3.json"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", *engine, program, results]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    record = json.loads(results.read_text())
    before, zero, after = record["outputs"]
    assert before == after != 0
    assert zero == 0
    # Where the engine says that it keeps them: on the host if they are offloaded. DeepSpeed returns copies on the GPU.
    assert record["devices"] == ["meta"]


def test_weights_that_do_not_fit_are_refused(transformer: WanTransformer3DModel, empty: WanTransformer3DModel) -> None:
    weights = transformer.state_dict()
    short = {name: value for name, value in weights.items() if name != "proj_out.bias"}
    with pytest.raises(ValueError, match=r"1 weights are missing or left over, such as 'proj_out.bias'"):
        fill_weights(empty, short, dtype=torch.float32)
    with pytest.raises(ValueError, match="'more'"):
        fill_weights(empty, weights | {"more": torch.zeros(1)}, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'proj_out.bias' must have the shape \(64,\), got \(3,\)"):
        fill_weights(empty, weights | {"proj_out.bias": torch.zeros(3)}, dtype=torch.float32)


def test_masters_of_one_process_are_the_parameters() -> None:
    accelerator = Accelerator(cpu=True)
    layer, optimizer = accelerator.prepare(model := torch.nn.Linear(3, 2), torch.optim.AdamW(model.parameters()))
    masters = Masters(dict(layer.named_parameters()), optimizer)
    assert [value.data_ptr() for value in masters.values()] == [layer.weight.data_ptr(), layer.bias.data_ptr()]
    new = {"bias": torch.tensor([1.0, 2.0]), "weight": torch.ones(2, 3), "frozen": torch.ones(9)}
    masters.write(masters.share_of(new))
    assert full_state_dict(accelerator, model)["bias"].tolist() == [1.0, 2.0]
    assert (layer.weight == 1).all()
    layer.weight.data.zero_()
    assert (new["weight"] == 1).all()
    with pytest.raises(ValueError, match="1 weights are missing, such as 'weight'"):
        masters.share_of({"bias": new["bias"]})
    with pytest.raises(ValueError, match=r"'bias' must have the shape \(2,\), got \(2, 3\)"):
        masters.share_of({"bias": new["weight"], "weight": new["weight"]})


def test_shares_are_where_the_masters_are() -> None:
    """ZeRO can hold masters on the host beside working copies on a GPU, here the meta device."""
    address = SimpleNamespace(start=1, numel=4)
    mapping = SimpleNamespace(get_hp_fragment=lambda: torch.zeros(4), lp_fragment_address=address)
    parameter = SimpleNamespace(shape=torch.Size((2, 3)), device=torch.device("meta"), _hp_mapping=mapping)
    masters = Masters({"weight": parameter}, optimizer=None)
    (share,) = masters.share_of({"weight": torch.arange(6.0).view(2, 3)})
    assert share.device.type == masters.values()[0].device.type == "cpu"
    assert share.tolist() == [1.0, 2.0, 3.0, 4.0]
