"""Training steps of 14B on a pretended CUDA device: they run, and need what the planner says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.real_size.library import compile_library
from examples.real_size.real_size import RESULTS, ROOT, compare, faults, measure_recipes, options_of, page
from examples.real_size.recipes import load_recipe, recipe_paths


def pretends(test: Any) -> Any:
    """Mark for tests that start the pretended device."""
    test = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")(test)
    reason = "a build of torch with CUDA cannot pretend"
    return pytest.mark.launch(pytest.mark.skipif(torch.version.cuda is not None, reason=reason)(test))


MEASURED = json.loads(RESULTS.read_text(encoding="utf-8"))
PATHS = {load_recipe(path).name: path for path in recipe_paths()}


def test_every_recipe_has_run() -> None:
    assert set(PATHS) == set(MEASURED["recipes"])


def test_page_is_what_the_results_say() -> None:
    """The page has the measured columns of the JSON file and the planner's, which are computed again here."""
    assert (ROOT / "docs" / "real_size.md").read_text(encoding="utf-8") == page(MEASURED)


@pytest.mark.parametrize("name", MEASURED["recipes"])
def test_results_are_of_the_recipe_and_agree_with_the_plan(name: str) -> None:
    measured = MEASURED["recipes"][name]
    assert measured["options"] == options_of(load_recipe(PATHS[name]))
    assert faults(compare(PATHS[name], measured)) == []


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("build"))


@pretends
def test_a_step_at_real_size(library: Path) -> None:
    """Autocast with offloaded block inputs; DeepSpeed's bfloat16 with context parallelism; preference pairs."""
    names = ["prfl/wan2.1_t2v_14b_720p_lora", "prfl/wan2.1_i2v_14b_480p_full", "reward/wan2.1_t2v_14b_480p_bt"]
    for name, measured in zip(names, measure_recipes([PATHS[name] for name in names], library), strict=True):
        assert "error" not in measured, measured["error"]
        assert faults(compare(PATHS[name], measured)) == [], name


@pretends
def test_a_clip_is_shared_under_autocast(library: Path, tmp_path: Path) -> None:
    """No recipe has DDP with context parallelism. CUDA's autocast makes queries and keys float32 there, values not."""
    recipe = tmp_path / "shared_480p.yaml"
    text = PATHS["prfl/wan2.1_t2v_1.3b_480p_lora"].read_text(encoding="utf-8")
    recipe.write_text(f"{text}context_parallel_degree: 2\n", encoding="utf-8")
    (measured,) = measure_recipes([recipe], library)
    assert "error" not in measured, measured["error"]
    assert faults(compare(recipe, measured)) == []


@pretends
def test_a_recipe_that_fails_leaves_the_next_one_alone(library: Path, tmp_path: Path) -> None:
    text = PATHS["prfl/wan2.1_t2v_1.3b_480p_lora"].read_text(encoding="utf-8")
    recipes = [tmp_path / f"{name}_480p.yaml" for name in ("a", "b")]
    for recipe, replacement in zip(recipes, ("gradient_checkpointing_blocks: 7", "lora_rank: -1"), strict=True):
        recipe.write_text(text.replace("gradient_checkpointing: true", replacement))
    first, second = measure_recipes(recipes, library)
    assert "gradient_checkpointing_blocks" in first["error"].splitlines()[-1]
    assert "lora_rank" in second["error"].splitlines()[-1]


@pretends
def test_the_device_refuses_what_cuda_refuses(library: Path) -> None:
    """Errors of CUDA are raised: operands of different types without autocast. Autocast computes norms in float32."""
    program = (
        "import pathlib, sys\n"
        "from examples.real_size.library import load_library\n"
        "load_library(pathlib.Path(sys.argv[1]))\n"
        "from examples.real_size.pretended_cuda import start\n"
        "start()\n"
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    states = torch.empty(1, 2, 8, 16, device='cuda')\n"
        "    with torch.autocast('cuda', torch.bfloat16):\n"
        "        print(torch.nn.RMSNorm(16, device='cuda')(states.bfloat16()).dtype)\n"
        "    torch.nn.functional.scaled_dot_product_attention(states, states, states.bfloat16())\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == "torch.float32"
    assert finished.stderr.splitlines()[-1].startswith("RuntimeError: Expected query, key, and value to have the same")


@pretends
def test_quantised_and_offloaded_weights(library: Path) -> None:
    """By hand: bytes of a layer in nf4, and what its products allocate; where an offloaded model's weights are."""
    program = (
        "import pathlib, sys\n"
        "from examples.real_size.library import load_library\n"
        "load_library(pathlib.Path(sys.argv[1]))\n"
        "from examples.real_size.pretended_cuda import DeviceMeter, put_on_device, start\n"
        "start()\n"
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from examples.real_size.quantized import FourBitLinear\n"
        "from hy_prfl.runtime.host_weights import HostWeights\n"
        "layer = FourBitLinear(torch.nn.Linear(5120, 13824, device='meta'), has_adapter=False)\n"
        "linear = torch.nn.Linear(5120, 2000, device='meta').requires_grad_(False)\n"
        "with FakeTensorMode(), DeviceMeter() as meter:\n"
        "    put_on_device(layer)\n"
        "    print(meter.live)\n"
        "    states = torch.empty(2048, 5120, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "    before = meter.peak = meter.live\n"
        "    result = layer(states)\n"
        "    print(meter.peak - before, meter.live - before, meter.flops)\n"
        "    grad = torch.empty_like(result)\n"
        "    before = meter.peak = meter.live\n"
        "    result.backward(grad)\n"
        "    print(meter.peak - before, meter.live - before, meter.flops)\n"
        "    del result, grad, states, layer\n"
        "    put_on_device(linear)\n"
        "    weights = HostWeights(linear, torch.device('cuda', 0))\n"
        "    print(linear.weight.device, meter.live, weights.nbytes)\n"
        "    with weights.on_device():\n"
        "        print(linear.weight.device, meter.live)\n"
        "    print(linear.weight.device, meter.live)\n"
        "    linear(torch.empty(1, 5120, device='cuda'))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(library)], cwd=ROOT, capture_output=True, text=True)
    num = 5120 * 13824
    # Packed weights; a byte for each 64 of them; four for each 64 x 256; tables and mean scale; the bias. Each in 512s.
    scales_of_scales = -(-4 * num // 64 // 256 // 512) * 512
    held = num // 2 + num // 64 + scales_of_scales + 512 + 1024 + 512 + 2 * 13824
    # The weight in bfloat16 beside the output.
    whole, out, flops = 2 * num, 2 * 2048 * 13824, 2 * 2048 * num
    weight, bias = 4 * 5120 * 2000, 4 * 2000
    on_device = weight + -(-bias // 512) * 512
    # In the backward pass the weight is in float32 first, the type it was loaded in.
    assert finished.stdout.splitlines() == [
        f"{held}",
        f"{whole + out} {out} {flops}",
        f"{2 * whole + whole} {2 * 2048 * 5120} {2 * flops}",
        f"cpu 0 {weight + bias}",
        f"cuda:0 {on_device}",
        "cpu 0",
    ], finished.stderr[-2000:]
    assert "device" in finished.stderr.splitlines()[-1]


def test_differences_from_the_plan_are_told() -> None:
    good: dict[str, Any] = {
        "is_part": False, "is_shared": False, "most_syncs": 8, "measured": 10.0, "planned": 10.2, "measured_teraflops": 5.0,
        "planned_teraflops": 5.0, "num_syncs": 4, "sync_places": {}, "host_buffers": 0.0, "planned_host_buffers": 0.0,
    }  # fmt: skip
    assert faults(good) == []
    assert faults({**good, "planned": 11.0}) == ["measured 10, planned 11"]
    assert faults({**good, "is_part": True, "planned": 11.0}) == []
    assert faults({**good, "measured_teraflops": 5.1}) == ["measured_teraflops 5.1, planned_teraflops 5"]
    assert faults({**good, "num_syncs": 99, "sync_places": {"a.py:1": 99}}) == [
        "99 waits for the device: {'a.py:1': 99}"
    ]
