"""LoRAs in a transformer; files of every layout are in tests/inference/test_pipeline_loras.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from hy_prfl.formats import lora_loading
from hy_prfl.formats.lora import Adapter, LoraLayer, read_adapter
from hy_prfl.formats.lora_loading import check_adapter_fits, load_adapter

from .native_layout import make_transformer, run
from .test_lora import add_lora, save_lora


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "blocks.0.attn1.to_q": LoraLayer(noise(2, 24), noise(24, 2, seed=1), alpha=4.0),
    "blocks.2.ffn.net.2": LoraLayer(noise(3, 32, seed=2), noise(24, 3, seed=3), alpha=-1.5),
}
DIFFERENCES = {"blocks.1.norm2.weight": noise(24, seed=4), "blocks.1.attn2.to_k.bias": noise(24, seed=5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_differences(dtype: torch.dtype) -> None:
    expected = make_transformer().to(dtype)
    with torch.no_grad():
        for name, layer in LAYERS.items():
            update = 0.5 * layer.alpha / len(layer.down) * layer.up @ layer.down
            weight = expected.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() + update)
        for name, difference in DIFFERENCES.items():
            weight = expected.get_parameter(name)
            weight.copy_(weight.float() + 0.5 * difference)
    found = make_transformer().to(dtype)
    assert load_adapter(found, Adapter(LAYERS, DIFFERENCES), "mine", scale=0.5, source="x")
    found.set_adapters(["mine"], [0.5])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    outputs = [run_in(model, dtype) for model in (found, expected, make_transformer().to(dtype))]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    assert (outputs[1] - outputs[2]).abs().max() > 1.5 * tolerance
    # The differences are in the weights, bit for bit.
    for name in DIFFERENCES:
        parameter = name.replace(".bias", ".base_layer.bias") if name not in dict(found.named_parameters()) else name
        assert torch.equal(found.get_parameter(parameter), expected.get_parameter(name))


def run_in(model: WanTransformer3DModel, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return run(model)
    with torch.autocast("cpu", dtype=dtype):
        return run(model).float()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_all_of_peft_in_bfloat16(tmp_path: Path, options: dict[str, Any]) -> None:
    trained = make_transformer()
    add_lora(trained, ["to_q", "ffn.net.2"], r=3, lora_alpha=2, **options)
    adapter = read_adapter(save_lora(trained, tmp_path / "prfl"))
    model = make_transformer().to(torch.bfloat16)
    assert load_adapter(model, adapter, "mine", source="x")
    arrived, expected = get_peft_model_state_dict(model, adapter_name="mine"), get_peft_model_state_dict(trained)
    assert set(arrived) == set(expected)
    # As diffusers does it, adapters have the type of the model.
    assert all(torch.equal(arrived[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())


def test_differences_alone_make_no_adapter() -> None:
    model = make_transformer()
    assert not load_adapter(model, Adapter({}, DIFFERENCES), "mine", source="x")
    assert not hasattr(model, "peft_config")


def test_nothing_is_changed_by_a_lora_that_does_not_fit() -> None:
    model = make_transformer()
    before = copy.deepcopy(model.state_dict())
    adapter = Adapter({**LAYERS, "blocks.3.attn1.to_q": LAYERS["blocks.0.attn1.to_q"]}, DIFFERENCES)
    with pytest.raises(
        ValueError, match=r"x: 1 tensors have no place in the model: 'blocks\.3\.attn1\.to_q'.*has 3 bl"
    ):
        load_adapter(model, adapter, "mine", source="x")
    assert set(before) == set(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (
            "t2v",
            "condition_embedder.image_embedder.pos_embed",
            "Only image-to-video models of Wan2.1 have layers for an",
        ),
        (
            "i2v",
            "condition_embedder.image_embedder.pos_embed",
            "Only models of Wan2.1 for a first and a last frame have",
        ),
        (
            "wan2.2-i2v",
            "blocks.0.attn2.norm_added_k.weight",
            "Only image-to-video models of Wan2.1 have layers for an",
        ),
    ],
)
def test_why_there_is_no_place(kind: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"no place in the model: '{name}'. {reason}"):
        load_adapter(make_transformer(kind), Adapter({}, {name: noise(24)}), "mine", source="x")


@pytest.mark.parametrize("part", ["down", "up", "bias", "magnitude", "difference"])
@pytest.mark.parametrize("problem", ["nan", "shape"])
def test_every_tensor_is_checked_before_anything_is_changed(part: str, problem: str) -> None:
    model, name = make_transformer(), "blocks.0.attn1.to_q"
    before = copy.deepcopy(model.state_dict())
    tensors = {"down": noise(2, 24), "up": noise(24, 2), "bias": noise(24), "magnitude": noise(24)}
    differences = {"blocks.0.norm2.weight": noise(24)}
    found = differences if part == "difference" else tensors
    key = next(iter(differences)) if part == "difference" else part
    if problem == "nan":
        found[key].view(-1)[-1] = torch.nan
    else:
        found[key] = torch.ones(*found[key].shape, 1)
    adapter = Adapter({name: LoraLayer(**tensors, alpha=1.0)}, differences)
    message = "holds a NaN" if problem == "nan" else "must be"
    with pytest.raises(ValueError, match=rf"x: the {part} of '.*{message}"):
        load_adapter(model, adapter, "mine", source="x")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["t2v", "i2v", "wan2.2-ti2v"])
def test_on_the_meta_device(kind: str) -> None:
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(make_transformer(kind).config)
    check_adapter_fits(Adapter(LAYERS, DIFFERENCES), model, source="x")
    channels = model.config.in_channels
    layer = LoraLayer(noise(2, 36, 1, 2, 2), noise(24, 2, 1, 1, 1), alpha=1.0)
    adapter = Adapter({"patch_embedding": layer})
    if channels == 36:
        check_adapter_fits(adapter, model, source="x")
    else:
        with pytest.raises(
            ValueError, match=rf"down of 'patch_embedding'.*\(2, {channels}, 1, 2, 2\) for this model, got"
        ):
            check_adapter_fits(adapter, model, source="x")


class TestArrived:
    """What is in the model is compared with the file: a newer peft may take it in another way."""

    def loaded(self) -> tuple[WanTransformer3DModel, Adapter, dict[str, torch.Tensor]]:
        model, adapter = make_transformer(), Adapter(LAYERS)
        load_adapter(model, adapter, "mine", source="x")
        weights = get_peft_model_state_dict(model, adapter_name="mine")
        return model, adapter, {name: tensor.clone() for name, tensor in weights.items()}

    def check(self, model: WanTransformer3DModel, adapter: Adapter, weights: dict[str, torch.Tensor]) -> None:
        lora_loading._check_arrived(model, adapter, "mine", weights, "x")

    def test_changed_weight(self) -> None:
        model, adapter, weights = self.loaded()
        self.check(model, adapter, weights)
        model.get_submodule("blocks.0.attn1.to_q").lora_B["mine"].weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=r"x: 1 of 4 tensors .* such as blocks\.0\.attn1\.to_q\.lora_B\.weight"):
            self.check(model, adapter, weights)

    def test_missing_and_additional_weights(self) -> None:
        model, adapter, weights = self.loaded()
        with pytest.raises(ValueError, match=r"were not loaded .* such as blocks\.9\.x\.lora_A\.weight"):
            self.check(model, adapter, {**weights, "blocks.9.x.lora_A.weight": torch.zeros(1)})
        name = next(iter(weights))
        with pytest.raises(ValueError, match=f"such as {name}"):
            self.check(model, adapter, {key: tensor for key, tensor in weights.items() if key != name})

    def test_scale(self) -> None:
        model, adapter, weights = self.loaded()
        model.get_submodule("blocks.2.ffn.net.2").scaling["mine"] = 1.0
        with pytest.raises(ValueError, match=r"were not loaded into the model, such as blocks\.2\.ffn\.net\.2\."):
            self.check(model, adapter, weights)

    def test_a_second_adapter_beside_it(self) -> None:
        model, adapter, weights = self.loaded()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name="other")
        self.check(model, adapter, weights)
