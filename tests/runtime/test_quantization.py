"""Quantised frozen weights: what they are, how far off they are, and what passes through them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from hy_prfl.models.loading import load_reward_model, load_transformer, make_reward_model
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.quantization import (
    PACKAGES,
    Quantizer,
    check_quantization,
    dequantized,
    is_quantized,
    quantized_bytes,
    quantized_names,
)


CPU = torch.device("cpu")
# Largest relative error of the velocity of the tiny model, and of the gradient that passes through it.
VELOCITY_ERRORS = {"int8": 0.004, "float8": 0.025}
KINDS = list(VELOCITY_ERRORS)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 16, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=generator),
    }


def load(pipeline_dir: Path, kind: Any, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    quantizer = Quantizer(kind, device=CPU, dtype=dtype)
    return load_transformer(str(pipeline_dir), dtype=dtype, quantizer=quantizer).requires_grad_(False)


@pytest.fixture(scope="module")
def whole(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").requires_grad_(False).eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_and_gradient_differ_little(pipeline_dir: Path, whole: WanTransformer3DModel, kind: str) -> None:
    """Against diffusers' own model; the gradient with respect to the latents is what a chain passes on."""
    results = []
    for model in (whole, load(pipeline_dir, kind)):
        given = inputs()
        latents = given["hidden_states"].requires_grad_()
        velocity = model(**given).sample
        results.append((velocity.detach(), torch.autograd.grad(velocity.square().sum(), latents)[0]))
    (velocity, gradient), (own_velocity, own_gradient) = results
    assert 0 < relative_error(own_velocity, velocity) < VELOCITY_ERRORS[kind]
    assert 0 < relative_error(own_gradient, gradient) < 2 * VELOCITY_ERRORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_on_the_grid_of_their_row(
    pipeline_dir: Path, whole: WanTransformer3DModel, kind: str
) -> None:
    """int8: 255 even steps between the largest value of a row and its opposite. float8: four bits of significance."""
    model = load(pipeline_dir, kind)
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name)
        if not is_quantized(parameter):
            assert torch.equal(parameter, expected), name
            continue
        largest = expected.abs().amax(dim=1, keepdim=True)
        bound = largest / 127 / 2 if kind == "int8" else torch.maximum(expected.abs() / 16, largest / 448 / 256)
        assert ((dequantized(parameter) - expected).abs() <= 1.02 * bound).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_of_blocks_are_quantised(
    pipeline_dir: Path, whole: WanTransformer3DModel, kind: str
) -> None:
    model = load(pipeline_dir, kind, torch.bfloat16)
    found = {name for name, parameter in model.named_parameters() if is_quantized(parameter)}
    linear = {f"{name}.weight" for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in linear if name.startswith("blocks.")} == set(quantized_names(whole))
    # The rest is as diffusers loads it.
    half = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert name in found or torch.equal(parameter, half.get_parameter(name)), name
        assert name in found or parameter.dtype == half.get_parameter(name).dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(pipeline_dir: Path, kind: Any) -> None:
    for name, parameter in load(pipeline_dir, kind).named_parameters():
        if is_quantized(parameter):
            names = [*parameter.tensor_data_names, *getattr(parameter, "optional_tensor_data_names", [])]
            parts = [part for part in (getattr(parameter, each) for each in names) if part is not None]
            assert quantized_bytes(kind, tuple(parameter.shape)) == sum(part.nbytes for part in parts), name


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        # Codes, scales, scales of scales; and the tables of 16 and of 256 float32 values, and the offset of the scales. As
        # bitsandbytes 0.50.2 has them in memory.
        ((2048, 512), 524288 + 16384 + 256 + (64 + 1024 + 4)),
        ((5120, 1728), 4423680 + 138240 + 2160 + (64 + 1024 + 4)),
        ((32, 32), 512 + 16 + 4 + (64 + 1024 + 4)),
        # Blocks that are not full.
        ((33, 65), 1073 + 34 + 4 + (64 + 1024 + 4)),
    ],
)
def test_bytes_of_nf4(shape: tuple[int, int], num_bytes: int) -> None:
    assert quantized_bytes("nf4", shape) == num_bytes


def test_bytes_of_nf4_are_those_of_bitsandbytes(whole: WanTransformer3DModel) -> None:
    """As diffusers makes them, which itself wants a GPU; bitsandbytes does without one."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")
    for name in quantized_names(whole):
        weight = whole.get_parameter(name).detach()
        options = {"quant_type": "nf4", "compress_statistics": True}
        made = bitsandbytes.nn.Params4bit(weight.to(torch.bfloat16), requires_grad=False, **options).to("cpu")
        state = made.quant_state
        parts = [made, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert quantized_bytes("nf4", tuple(weight.shape)) == sum(part.nbytes for part in parts), name
        # Four bits and not eight, which differ by less than 0.01.
        assert 0.05 < relative_error(dequantized(made).float(), weight) < 0.12, name


def test_four_bits_of_a_square_weight() -> None:
    """Half a byte each, a byte for 64 of them, four for 64 x 256 (QLoRA: 0.127 bits of scales a weight)."""
    assert quantized_bytes("nf4", (5120, 5120)) * 8 / 5120**2 == pytest.approx(4.127, abs=1e-3)


def test_reward_models_score_alike(pipeline_dir: Path, whole: WanTransformer3DModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WanRewardModel.from_transformer(whole, num_layers=2).eval()
    model.save_pretrained(tmp_path)
    quantizer = Quantizer("int8", device=CPU, dtype=torch.float32)
    loaded = load_reward_model(str(tmp_path), quantizer=quantizer)
    assert not any(is_quantized(parameter) for parameter in loaded.head.parameters())
    assert not any(is_quantized(parameter) for parameter in loaded.pooler.parameters())
    torch.manual_seed(0)
    made = make_reward_model(
        str(pipeline_dir), num_layers=2, quantizer=Quantizer("int8", device=CPU, dtype=torch.float32)
    )
    expected = model(**inputs(), output_features=True).features
    for each in (loaded, made):
        assert sum(map(is_quantized, each.parameters())) == len(quantized_names(model))
        features = each(**inputs(), output_features=True).features
        assert 0 < relative_error(features, expected) < VELOCITY_ERRORS["int8"]
    # What is saved are whole weights, which a configuration of quantisation would contradict.
    loaded.save_config(tmp_path / "again")
    assert WanRewardModel.load_own_config(tmp_path / "again").get("quantization_config") is None


def test_a_weight_that_is_not_finite_is_named(pipeline_dir: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model.blocks[1].ffn.net[2].weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"'blocks\.1\.ffn\.net\.2\.weight' holds a NaN"):
        load(tmp_path, "int8")


def test_what_cannot_be_made_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization("base_quantization", None, device=CPU)
    check_quantization("base_quantization", "int8", device=CPU)
    with pytest.raises(ValueError, match=r"`base_quantization` must be int8 or float8 on cpu; nf4 needs a CUDA GPU"):
        check_quantization("base_quantization", "nf4", device=CPU)
    monkeypatch.setitem(PACKAGES, "nf4", "a_package_that_nobody_has")
    with pytest.raises(
        ImportError, match=r"`base_quantization` nf4 needs a_package_that_nobody_has: pip install 'hy-"
    ):
        check_quantization("base_quantization", "nf4", device=torch.device("cuda"))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("float8", 0.04)])
def test_velocity_of_a_trained_generator(kind: str, most: float) -> None:
    """Of the demo, at three noise levels: the error of int8 is smaller than that of arithmetic in bfloat16."""
    folder = Path(__file__).parents[2] / "examples/shapes/pretrained"
    whole = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").requires_grad_(False).eval()
    half = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(3, 16, 5, 8, 8, generator=generator),
        "timestep": torch.tensor([900.0, 500.0, 100.0]),
        "encoder_hidden_states": torch.randn(3, 16, whole.config.text_dim, generator=generator),
    }
    expected = whole(**given).sample
    error = relative_error(load(folder, kind)(**given).sample, expected)
    assert 0 < error < most
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounding = relative_error(half(**given).sample, expected)
    assert (error < rounding) == (kind == "int8")
