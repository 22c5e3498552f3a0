import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from hy_prfl.flow_matching import add_noise
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_reward_model, load_scheduler, load_transformer
from hy_prfl.models.reward_model import (
    WanRewardModel,
    WanRewardModelOutput,
    reward_training_loss,
    score_noised,
)


@pytest.fixture(scope="module")
def transformer(pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")


@pytest.fixture(scope="module")
def i2v_transformer(i2v_pipeline_dir: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")


def inputs(batch_size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch_size, 16, 2, 4, 6, generator=generator),
        "timestep": torch.linspace(50, 1000, batch_size),
        "encoder_hidden_states": torch.randn(batch_size, 16, 32, generator=generator),
    }


def test_output_survives_accelerates_autocast(transformer: WanTransformer3DModel) -> None:
    """Accelerate rebuilds the output of a prepared model in float32."""
    model = WanRewardModel.from_transformer(transformer, num_layers=2)
    output = model(**inputs())
    assert output.features is None
    assert torch.equal(model(**inputs(), return_dict=False)[0], output.logits)
    rebuilt = convert_to_fp32(model(**inputs(), output_features=True))
    assert isinstance(rebuilt, WanRewardModelOutput)
    assert torch.equal(rebuilt.logits, output.logits)
    assert rebuilt.features is not None
    assert torch.equal(convert_to_fp32(output).logits, output.logits)


def test_head_keeps_its_precision_under_autocast(transformer: WanTransformer3DModel) -> None:
    """If logits were rounded to bfloat16, their gradients would cancel in the last bias for a balanced batch."""
    model = WanRewardModel.from_transformer(transformer, num_layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs()).logits
    assert (logits != logits.bfloat16().float()).all()
    torch.testing.assert_close(logits, model(**inputs()).logits, rtol=0.05, atol=0.01)


def test_features_are_those_of_the_generators_first_blocks(transformer: WanTransformer3DModel) -> None:
    seen: list[torch.Tensor] = []
    hook = transformer.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    transformer(**inputs())
    hook.remove()
    model = WanRewardModel.from_transformer(transformer, num_layers=2)
    torch.testing.assert_close(model(**inputs(), output_features=True).features, seen[0])


def test_weights_are_copies(transformer: WanTransformer3DModel) -> None:
    model = WanRewardModel.from_transformer(transformer, num_layers=1)
    before = transformer.blocks[0].ffn.net[2].weight.clone()
    model.blocks[0].ffn.net[2].weight.data.zero_()
    assert torch.equal(transformer.blocks[0].ffn.net[2].weight, before)


@pytest.mark.parametrize("pooling", ["query", "mean", "max"])
def test_samples_of_a_batch_do_not_touch_each_other(transformer: WanTransformer3DModel, pooling: str) -> None:
    model = WanRewardModel.from_transformer(transformer, num_layers=2, pooling=pooling).eval()
    whole = model(**inputs(4)).logits
    assert whole.shape == (4,)
    for index in range(4):
        single = model(**{name: value[index : index + 1] for name, value in inputs(4).items()}).logits
        torch.testing.assert_close(single, whole[index : index + 1])


def test_saving_and_loading_is_exact(transformer: WanTransformer3DModel, tmp_path: Path) -> None:
    model = WanRewardModel.from_transformer(
        transformer, num_layers=2, pooling="query", num_query_heads=4, query_residual=False, head_dims=(40, 20),
        task="human_quality", vae_fingerprint="abc",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    loaded = load_reward_model(str(tmp_path / "model"))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"
    }
    torch.testing.assert_close(loaded(**inputs()).logits, model(**inputs()).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_a_model_with_a_missing_or_foreign_weight_does_not_load(
    transformer: WanTransformer3DModel, tmp_path: Path
) -> None:
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    state_dict = load_file(weights)
    save_file({name: value for name, value in state_dict.items() if name != "head.linear_3.bias"}, weights)
    with pytest.raises(ValueError, match=r"1 missing_keys, such as head.linear_3.bias"):
        WanRewardModel.from_pretrained(tmp_path / "model")
    save_file(state_dict | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="1 unexpected_keys, such as extra"):
        WanRewardModel.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["_class_name"] = "WanTransformer3DModel"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a WanRewardModel"):
        WanRewardModel.from_pretrained(tmp_path / "model")


def test_gradient_reaches_the_input_and_no_weight_of_a_frozen_model(transformer: WanTransformer3DModel) -> None:
    model = WanRewardModel.from_transformer(transformer, num_layers=2).requires_grad_(False)
    batch = inputs()
    batch["hidden_states"].requires_grad_()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        grads.append(torch.autograd.grad(model(**batch).logits.sum(), batch["hidden_states"])[0])
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_agrees_with_finite_differences(transformer: WanTransformer3DModel) -> None:
    # One layer norm of diffusers always computes in float32, so the step must not be too small.
    torch.manual_seed(2)  # with a kink of a ReLU in between, the difference says little
    model = WanRewardModel.from_transformer(transformer, num_layers=1, pooling="mean").requires_grad_(False)
    batch = inputs(1)
    batch["hidden_states"].requires_grad_()
    (grad,) = torch.autograd.grad(model(**batch).logits.sum(), batch["hidden_states"])
    direction = grad / grad.norm()
    step = 0.01
    with torch.no_grad():
        ahead, behind = (
            model(**(batch | {"hidden_states": batch["hidden_states"] + sign * step * direction})).logits
            for sign in (1, -1)
        )
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((grad * direction).sum().item(), rel=0.02)


def test_adapter_can_be_added(transformer: WanTransformer3DModel) -> None:
    from peft import LoraConfig

    model = WanRewardModel.from_transformer(transformer, num_layers=1).eval()
    before = model(**inputs()).logits
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.testing.assert_close(model(**inputs()).logits, before)
    assert any("lora_B" in name for name, _ in model.named_parameters())


def test_image_to_video_inputs(i2v_transformer: WanTransformer3DModel) -> None:
    model = WanRewardModel.from_transformer(i2v_transformer, num_layers=2)
    batch = inputs()
    batch["hidden_states"] = torch.randn(3, 36, 2, 4, 6)
    logits = model(**batch, encoder_hidden_states_image=torch.randn(3, 5, 32)).logits
    assert logits.shape == (3,)
    with pytest.raises(ValueError, match="takes `encoder_hidden_states_image`"):
        model(**batch)


def test_scoring_noises_and_appends_the_condition(i2v_transformer: WanTransformer3DModel) -> None:
    model = WanRewardModel.from_transformer(i2v_transformer, num_layers=1)
    latents, noise, condition = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4), torch.randn(2, 20, 2, 4, 4)
    sigmas, text, image = torch.tensor([0.2, 0.9]), torch.randn(2, 16, 32), torch.randn(2, 5, 32)
    expected = model(
        torch.cat([add_noise(latents, noise, sigmas), condition], dim=1), torch.tensor([200.0, 900.0]), text, image
    ).logits
    actual = score_noised(
        model, latents=latents, noise=noise, sigmas=sigmas,
        conditioning=Conditioning(text, image_embeds=image, condition=condition),
    )  # fmt: skip
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("in_pairs", [False, True])
def test_training_loss_is_one_call_with_one_noise_for_both_clips_of_a_pair(
    transformer: WanTransformer3DModel, in_pairs: bool
) -> None:
    """Against each clip noised and scored by itself, and the losses written out."""
    model = WanRewardModel.from_transformer(transformer, num_layers=1)
    # Spreads the logits, which are all close to zero before a training.
    torch.nn.init.normal_(model.head.linear_3.weight, std=1.0)
    clips, noise, sigmas = torch.randn(4, 16, 2, 4, 4), torch.randn(2, 16, 2, 4, 4), torch.tensor([0.2, 0.9])
    text, labels = torch.randn(4, 16, 32), torch.tensor([1.0, 0.0])
    logits = []
    for index in range(4):
        sigma = sigmas[index % 2]
        noisy = (1 - sigma) * clips[index] + sigma * noise[index % 2]
        logits.append(model(noisy[None], 1000 * sigma[None], text[index : index + 1]).logits)
    scores = torch.cat(logits).detach()
    if in_pairs:
        margin = scores[:2] - scores[2:]
        expected = -margin.sigmoid().log().mean()
    else:
        margin = torch.stack([scores[0], -scores[1]])
        expected = -(scores[0].sigmoid().log() + (1 - scores[1].sigmoid()).log()) / 2
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(output.logits)))
    count = 4 if in_pairs else 2
    loss, found = reward_training_loss(
        model, latents=clips[:count], noise=noise, sigmas=sigmas, conditioning=Conditioning(text[:count]),
        labels=None if in_pairs else labels,
    )  # fmt: skip
    assert calls == [count]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, margin)
    assert loss.requires_grad
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.randn(3, 36, 2, 4, 6)}, r"\(batch_size, 16, num_frames, height, width\)"),
        ({"hidden_states": torch.randn(3, 16, 4, 6)}, "`hidden_states`"),
        ({"hidden_states": torch.randn(3, 16, 2, 5, 6)}, "multiple of the patch size"),
        ({"timestep": torch.tensor([1.0])}, "one value per sample"),
        ({"encoder_hidden_states_image": torch.randn(3, 5, 32)}, "takes no image embeddings"),
    ],
)
def test_bad_inputs_are_refused(transformer: WanTransformer3DModel, change: dict[str, Any], message: str) -> None:
    model = WanRewardModel.from_transformer(transformer, num_layers=1)
    with pytest.raises(ValueError, match=message):
        model(**(inputs() | change))


def test_too_many_blocks_are_refused(transformer: WanTransformer3DModel) -> None:
    with pytest.raises(ValueError, match="`num_layers` is 4, but the transformer has only 3 blocks"):
        WanRewardModel.from_transformer(transformer, num_layers=4)


def test_half_precision_keeps_what_must_be_float32(transformer: WanTransformer3DModel, tmp_path: Path) -> None:
    WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path / "model")
    model = load_reward_model(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.head.linear_1.weight.dtype == torch.float32
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    batch = {name: value if name == "timestep" else value.bfloat16() for name, value in inputs().items()}
    assert model(**batch).logits.dtype == torch.float32


def test_schedulers_other_than_flow_unipc_are_refused(pipeline_dir: Path, tmp_path: Path) -> None:
    assert load_scheduler(str(pipeline_dir)).config.flow_shift == 3.0
    assert load_scheduler(str(pipeline_dir), flow_shift=7.0).config.flow_shift == 7.0
    config = json.loads((pipeline_dir / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"use_flow_sigmas": False}))
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        load_scheduler(str(tmp_path))


def test_transformer_loads_in_the_type_asked_for(pipeline_dir: Path) -> None:
    assert load_transformer(str(pipeline_dir)).dtype == torch.float32
    assert load_transformer(str(pipeline_dir), dtype=torch.bfloat16).dtype == torch.bfloat16
