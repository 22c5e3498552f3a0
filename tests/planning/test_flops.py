"""Planned FLOPs against torch's FLOP counter on real tensors, and against a count by hand."""

import math
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.losses import bradley_terry_loss, flow_matching_loss, reward_feedback_loss
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.models.shared_backbone import share_backbone
from hy_prfl.models.trainable import select_trainable
from hy_prfl.planning.engines import Engine
from hy_prfl.planning.estimate import Request, estimate
from hy_prfl.planning.models import reward_model_config
from hy_prfl.planning.plan import plan
from hy_prfl.planning.workloads import Shape
from hy_prfl.rollout.chain import walk_with_gradient
from hy_prfl.rollout.gradient_steps import GradientStep
from hy_prfl.rollout.reward_feedback import RewardFeedback
from hy_prfl.rollout.sampling import predict_velocity
from tests.planning.recipes import prfl_recipe, reward_recipe


TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 5, "text_dim": 32}
MIDDLE = {"num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768, "num_layers": 6, "text_dim": 64}
I2V = {**TINY, "in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}
# Like Wan2.2 TI2V 5B: the image is the first latent frame, and each token has its own timestep.
FIRST_FRAME = {**MIDDLE, "in_channels": 48, "out_channels": 48}
SIZES = {
    "tiny": (TINY, (2, 4, 4)),
    "middle": (MIDDLE, (3, 16, 16)),
    "i2v": (I2V, (2, 6, 4)),
    "first frame": (FIRST_FRAME, (3, 8, 8)),
}
REWARD_LAYERS = 4
aten = torch.ops.aten
# torch's formulas for the CPU's attention kernel, which its counter leaves out.
COUNT_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def count_flops() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=COUNT_ATTENTION)


def full_config(sizes: dict[str, Any]) -> dict[str, Any]:
    with torch.device("meta"):
        config = WanTransformer3DModel(**sizes).config
    return {name: value for name, value in config.items() if not name.startswith("_")}


def real_update(
    sizes: dict[str, Any], training: PRFLTrainingConfig, latents_shape: tuple[int, ...], step_index: int
) -> dict[str, float]:
    """One update of each kind with real tensors, through the functions that the trainer calls."""
    transformer = WanTransformer3DModel(**sizes)
    reward_model = WanRewardModel.from_transformer(transformer, num_layers=REWARD_LAYERS).requires_grad_(False)
    select_trainable(transformer, training, dtype=torch.float32)
    if training.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        reward_model.enable_gradient_checkpointing()
    is_i2v, num_channels = sizes.get("image_dim") is not None, sizes.get("out_channels", 16)
    first_frame = torch.randn(1, 48, 1, *latents_shape[1:]) if sizes is FIRST_FRAME else None
    noise = torch.randn(1, num_channels, *latents_shape)
    condition = torch.randn(1, 20, *latents_shape) if is_i2v else first_frame
    given = Conditioning(
        torch.randn(1, 512, sizes["text_dim"]), torch.randn(1, 257, 32) if is_i2v else None, condition
    )
    counted = {}
    with count_flops() as counter:
        flow_matching_loss(predict_velocity(transformer, noise, torch.tensor([500.0]), given), noise).backward()
    counted["flow matching"] = counter.get_total_flops()
    with count_flops() as counter, torch.no_grad():
        for _ in range(step_index):
            predict_velocity(transformer, noise, torch.tensor([500.0]), given)
    counted["rollout"] = counter.get_total_flops()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with count_flops() as counter:
        (step,) = walk_with_gradient(
            transformer, scheduler, noise=noise, step_indices=[step_index], num_inference_steps=6, conditioning=given
        )
    counted["gradient step"] = counter.get_total_flops() - counted["rollout"]
    leaf, timesteps = step.latents.requires_grad_(), step.timesteps
    with count_flops() as counter:
        # The counter's hooks fail if a leaf is the input of a module.
        hidden_states = torch.cat([leaf, condition], dim=1) if is_i2v else leaf.clone()
        if first_frame is not None:
            hidden_states = torch.cat([first_frame, leaf[:, :, 1:]], dim=2)
            num_tokens = math.prod(latents_shape) // 4
            timesteps = timesteps.expand(num_tokens)[None]
        output = reward_model(
            hidden_states,
            timesteps,
            given.prompt_embeds,
            encoder_hidden_states_image=given.image_embeds,
        )
        (grad,) = torch.autograd.grad(reward_feedback_loss(output.logits), leaf)
    counted["reward"] = counter.get_total_flops()
    with count_flops() as counter:
        (surrogate,) = step.surrogates(grad)
        surrogate.backward()
    counted["gradient step"] += counter.get_total_flops()
    return counted


def estimated(sizes: dict[str, Any], training: Any, latents_shape: tuple[int, int, int]) -> dict[str, float]:
    config = full_config(sizes)
    reward_config = {**reward_model_config(config), "num_layers": REWARD_LAYERS}
    if not isinstance(training, PRFLTrainingConfig):
        reward_config = reward_model_config(config, training)
    engine = Engine(mixed_precision=False, on_gpu=False)
    shape = Shape(1, latents_shape, first_frame=sizes is FIRST_FRAME)
    others = [reward_config] * (len(getattr(training, "reward_sources", [""])) - 1)
    return estimate(Request(training, config, reward_config, engine, shape, other_reward_configs=others)).flops


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize("size", sorted(SIZES))
def test_update_agrees_with_the_flop_counter(size: str, options: dict[str, Any]) -> None:
    sizes, shape = SIZES[size]
    training = prfl_recipe(num_inference_steps=6, step_range=[3, 3], **options)
    counted = real_update(sizes, training, shape, step_index=3)
    planned = estimated(sizes, training, shape)
    assert set(planned) == set(counted)
    for part, count in counted.items():
        assert planned[part] == pytest.approx(count, rel=0.02), part


@pytest.mark.parametrize(
    "options", [{"loss": "bt"}, {"freeze_blocks": True}, {"gradient_checkpointing": True}], ids=str
)
def test_reward_training_agrees_with_the_flop_counter(options: dict[str, Any]) -> None:
    training = reward_recipe(num_layers=REWARD_LAYERS, **options)
    transformer = WanTransformer3DModel(**MIDDLE)
    model = WanRewardModel.from_transformer(transformer, num_layers=REWARD_LAYERS).requires_grad_(False)
    select_trainable(model, training, dtype=torch.float32)
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    shape, batch = (3, 16, 16), 2 if training.loss == "bt" else 1
    with count_flops() as counter:
        logits = model(torch.randn(batch, 16, *shape), torch.ones(batch), torch.randn(batch, 512, 64)).logits
        (bradley_terry_loss(*logits.chunk(2)) if batch == 2 else logits.sum()).backward()
    assert estimated(MIDDLE, training, shape)["reward"] == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_forward_agrees_with_a_count_by_hand() -> None:
    """14B at 720P, by hand: two FLOPs per weight and token, and two matrix products in attention."""
    config = PipelineInfo.known("Wan-AI/Wan2.1-T2V-14B-Diffusers").transformer
    dim, num_tokens, num_layers = 5120, 21 * 45 * 80, 40
    per_token = 6 * dim**2 + 2 * dim * config["ffn_dim"]  # self-attention, cross-attention's query and output
    per_text_token = 2 * dim**2
    linear = 2 * num_layers * (num_tokens * per_token + 512 * per_text_token)
    attention = 4 * num_layers * dim * num_tokens * (num_tokens + 512)
    training = prfl_recipe(num_inference_steps=3, step_range=[1, 1], gradient_checkpointing=True)
    engine = Engine(num_gpus=8, zero_stage=3)
    flops = estimate(Request(training, config, reward_model_config(config), engine, Shape(1, (21, 90, 160)))).flops
    assert flops["rollout"] == pytest.approx(linear + attention, rel=0.02)
    # Forward, forward again, and backward: twice the linear layers, and five products instead of two in attention.
    assert flops["flow matching"] == pytest.approx(4 * linear + 4.5 * attention, rel=0.02)


def test_rollout_is_the_mean_over_the_steps_that_are_drawn() -> None:
    """Against the mean over all sets of steps that can be drawn."""
    first, last, count = 2, 6, 2
    training = prfl_recipe(num_inference_steps=9, step_range=[first, last], num_gradient_steps=count)
    one = estimated(TINY, prfl_recipe(num_inference_steps=9, step_range=[1, 1]), (2, 4, 4))
    flops = estimated(TINY, training, (2, 4, 4))
    lengths = [max(drawn) + 1 - count for drawn in combinations(range(first, last + 1), count)]
    assert flops["rollout"] / one["rollout"] == pytest.approx(sum(lengths) / len(lengths))
    assert flops["gradient step"] == pytest.approx(count * one["gradient step"])
    rerun = estimated(TINY, prfl_recipe(num_inference_steps=9, step_range=[1, 1], rerun_gradient_step=True), (2, 4, 4))
    assert rerun["rollout"] == pytest.approx(2 * one["rollout"])


def test_checkpointing_in_part_of_the_blocks() -> None:
    training = prfl_recipe(
        num_inference_steps=6, step_range=[3, 3], gradient_checkpointing=True, gradient_checkpointing_blocks=3
    )
    few = estimated(MIDDLE, training, (3, 16, 16))["flow matching"]
    none = estimated(MIDDLE, prfl_recipe(), (3, 16, 16))["flow matching"]
    every = estimated(MIDDLE, prfl_recipe(gradient_checkpointing=True), (3, 16, 16))["flow matching"]
    assert few == pytest.approx((none + every) / 2, rel=0.01)


def test_attention_of_the_math_kernel_is_counted_alike() -> None:
    """Attention as plain matrix products, without the formula of the fused kernel, which runs one product again."""
    query = torch.randn(1, 2, 24, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 4 * math.prod(query.shape) * 24


def test_time_is_flops_over_rate() -> None:
    made = plan(
        prfl_recipe("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", gradient_checkpointing=True, gradient_accumulation_steps=2),
        height=480, width=832, num_frames=81, num_gpus=4, tflops=100, utilization=0.5, num_rows=81,
    )  # fmt: skip
    assert made.seconds_per_step == pytest.approx(sum(made.teraflops.values()) / 50)
    assert made.hours == pytest.approx(11 * made.seconds_per_step / 3600)


@pytest.mark.parametrize(
    ("options", "rollout", "gradient"),
    [
        # A chain of 6 steps. Steps 0 .. 4 may take gradient: on average 2 forwards come before the one with gradient.
        ({}, 2, 1),
        ({"rerun_gradient_step": True}, 3, 1),
        # 5 states are stored, each with its velocity.
        ({"rollout_interval": 4}, 5 / 4, 1),
        ({"rollout_interval": 4, "rerun_gradient_step": True}, 5 / 4 + 1, 1),
        # One state of five: the third on average.
        ({"rollout_interval": 4, "rollout_states": 1}, 3 / 4, 1),
        # Two steps with gradient end at 1 .. 4, the mean is 2.5: 3.5 forwards without gradient, 2 with it.
        ({"num_chained_steps": 2}, 3.5, 2),
        # 4 states, and both steps run twice.
        ({"rollout_interval": 4, "num_chained_steps": 2}, 4 / 4 + 2, 2),
        ({"reward_at": "foreseen"}, 2, 1),
        # Of the steps before the one with gradient, 0, 1 and 3 call the generator: 0, 1, 2, 2, 3 of them.
        ({"rollout_cache_interval": 2}, 8 / 5, 1),
        # The steps with gradient run once more: 1, 2, 3, 3, 4.
        ({"rollout_cache_interval": 2, "rerun_gradient_step": True}, 13 / 5, 1),
        # Steps 0 and 1, and the state that is kept if it is another one, 2 .. 4: 1, 2, 3, 3, 3.
        ({"rollout_cache_interval": 4, "rollout_interval": 4, "rollout_states": 1}, 12 / 5 / 4, 1),
        # Pairs of steps end at 1 .. 4: 0 1, 0 1 2, 0 1 2 3, 0 1 3 4.
        ({"rollout_cache_interval": 2, "num_chained_steps": 2}, 13 / 4, 2),
    ],
    ids=str,
)
def test_forwards_of_rollouts_and_chains(options: dict[str, Any], rollout: float, gradient: float) -> None:
    """Forwards counted by hand. `tests/trainers/test_prfl_rollouts.py` counts them in a trainer."""
    sizes, shape = SIZES["text"] if "text" in SIZES else next(iter(SIZES.values()))
    flops = estimated(sizes, prfl_recipe(num_inference_steps=6, **options), shape)
    single = estimated(sizes, prfl_recipe(num_inference_steps=6, step_range=[1, 1]), shape)
    assert flops["rollout"] / single["rollout"] == pytest.approx(rollout)
    assert flops["gradient step"] / single["gradient step"] == pytest.approx(gradient)
    assert flops["reward"] == pytest.approx(single["reward"])


@pytest.mark.parametrize(
    "options",
    [{"reward_disagreement": 0.5}, {"reward_combination": "product"}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_several_reward_models_agree_with_the_flop_counter(options: dict[str, Any]) -> None:
    """With the passes that the trainer makes, with and without gradient."""
    training = prfl_recipe(num_inference_steps=6, step_range=[3, 3], reward_models=["a", "b", "c"], **options)
    transformer, shape = WanTransformer3DModel(**MIDDLE), (3, 16, 16)
    models = [
        WanRewardModel.from_transformer(transformer, num_layers=REWARD_LAYERS).requires_grad_(False) for _ in "abc"
    ]
    for model in models:
        if training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        # The counter's hooks cannot have the leaf itself for a module's input.
        model.forward = partial(call_on_copy, model.forward)
    reward = RewardFeedback(training, models, names=["a", "b", "c"], autocast=nullcontext)
    latents = torch.randn(1, 16, *shape)
    step = GradientStep(latents, torch.tensor([500.0]), torch.tensor(0.2), latents, lambda *_: iter(()))
    with count_flops() as counter:
        reward.differentiate(step, Conditioning(torch.randn(1, 512, 64)))
    planned = estimated(MIDDLE, training, shape)
    assert planned["reward"] == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reward_models_on_one_backbone_agree_with_the_flop_counter(checkpointing: bool) -> None:
    """One pass through the blocks for three poolings and heads, and one for a model with other blocks."""
    training = prfl_recipe(
        num_inference_steps=6, step_range=[3, 3], reward_models=["a", "b", "c", "d"], reward_disagreement=0.5,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    transformer, shape = WanTransformer3DModel(**MIDDLE), (3, 16, 16)
    models = [
        WanRewardModel.from_transformer(transformer, num_layers=REWARD_LAYERS).requires_grad_(False) for _ in "abcd"
    ]
    for model in models:
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.forward = partial(call_on_copy, model.forward)
    for model in models[1:3]:
        share_backbone(model, models[0])
    reward = RewardFeedback(training, models, names=list("abcd"), autocast=nullcontext)
    latents = torch.randn(1, 16, *shape)
    step = GradientStep(latents, torch.tensor([500.0]), torch.tensor(0.2), latents, lambda *_: iter(()))
    with count_flops() as counter:
        reward.differentiate(step, Conditioning(torch.randn(1, 512, 64)))
    config = full_config(MIDDLE)
    judge = {**reward_model_config(config), "num_layers": REWARD_LAYERS}
    request = Request(
        training, config, judge, Engine(), Shape(1, shape), other_reward_configs=[judge] * 3,
        shared_backbones=[[0, 1, 2], [3]],
    )  # fmt: skip
    assert estimate(request).flops["reward"] == pytest.approx(counter.get_total_flops(), rel=0.02)


def call_on_copy(forward: Any, hidden_states: torch.Tensor, **inputs: Any) -> Any:
    return forward(hidden_states.clone(), **inputs)


def test_the_anchor_is_a_forward_for_each_gradient_step() -> None:
    options: dict[str, Any] = {"num_inference_steps": 6, "lora_rank": 4}
    single = estimated(TINY, prfl_recipe(step_range=[1, 1], **options), (2, 4, 4))
    anchored = estimated(TINY, prfl_recipe(anchor_scale=0.1, num_gradient_steps=2, **options), (2, 4, 4))
    assert "anchor" not in single
    assert anchored["anchor"] / single["rollout"] == pytest.approx(2)


def test_several_reward_models_take_their_memory() -> None:
    """All are there; one of them computes at a time, from host memory or not."""
    config = full_config(TINY)
    reward_config = {**reward_model_config(config), "num_layers": REWARD_LAYERS}

    def needs(num_models: int, **options: Any) -> Any:
        training = prfl_recipe(reward_models=["a", "b", "c"][:num_models], update_schedule="reward", **options)
        others = [reward_config] * (num_models - 1)
        return estimate(
            Request(training, config, reward_config, Engine(), Shape(1, (2, 4, 4)), other_reward_configs=others)
        )

    one, three, away = needs(1), needs(3), needs(3, offload_reward_model=True)
    assert three.held["reward model"] == 3 * one.held["reward model"]
    assert three.phases["reward"] == one.phases["reward"]
    assert away.held["reward model"] == 0
    assert away.host_memory["reward model in host memory"] == three.held["reward model"]
    assert away.phases["reward"] == one.phases["reward"] + one.held["reward model"]


def test_reward_models_on_one_backbone_take_the_memory_of_one_and_of_heads() -> None:
    config = full_config(TINY)
    judge = {**reward_model_config(config), "num_layers": REWARD_LAYERS}

    def needs(shared: list[list[int]] | None, num_gpus: int = 1, **options: Any) -> Any:
        training = prfl_recipe(reward_models=["a", "b", "c"], update_schedule="reward", **options)
        others = [judge] * 2
        return estimate(
            Request(
                training, config, judge, Engine(num_gpus=num_gpus), Shape(1, (2, 4, 4)), other_reward_configs=others,
                shared_backbones=shared,
            )
        )  # fmt: skip

    apart, together = needs(None), needs([[0, 1, 2]])
    model = WanRewardModel(**judge)
    # Heads stay in float32, poolings are in bfloat16.
    heads = sum(4 * each.numel() for each in model.head.parameters())
    heads += sum(2 * each.numel() for each in model.pooler.parameters())
    one = apart.held["reward model"] / 3
    assert together.held["reward model"] == one + 2 * heads
    away = needs([[0, 1, 2]], offload_reward_model=True)
    assert away.held["reward model"] == 0
    assert away.host_memory["reward model in host memory"] == together.held["reward model"]
    # Sharded models keep their own.
    sharded: dict[str, Any] = {"num_gpus": 2, "shard_reward_model": True}
    assert needs([[0, 1, 2]], **sharded).held == needs(None, **sharded).held
