"""Sums, text and advice of the plan."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hy_prfl.formats.pipeline_info import PipelineInfo
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.planning.engines import Engine
from hy_prfl.planning.models import build_transformer, count_parameters
from hy_prfl.planning.plan import plan
from tests.planning.recipes import prfl_recipe, reward_recipe


ROOT = Path(__file__).parents[2]
SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"
CLIP = {"height": 480, "width": 832, "num_frames": 81}
NUM_PARAMETERS = 1_418_996_800


def test_bucket_sizes_are_those_of_the_configurations() -> None:
    for stage in (2, 3):
        settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
        zero = settings["zero_optimization"]
        assert settings["bf16"]["enabled"]
        assert zero["reduce_bucket_size"] == getattr(Engine, f"zero{stage}_reduce_bucket")
    assert zero["stage3_prefetch_bucket_size"] == Engine.zero3_prefetch_bucket
    assert zero["stage3_param_persistence_threshold"] == Engine.zero3_persistence_threshold
    assert "stage3_max_live_parameters" not in zero
    assert "sub_group_size" not in zero


def test_engines_default_sizes_are_deepspeeds() -> None:
    deepspeed = pytest.importorskip("deepspeed.runtime.zero.config")
    defaults = deepspeed.DeepSpeedZeroConfig()
    assert defaults.max_live_parameters == Engine.zero3_max_live_parameters
    assert defaults.sub_group_size == Engine.zero3_sub_group


def test_sixteen_bytes_a_weight() -> None:
    """Bytes per trained weight in mixed precision: 2 + 4 + 12 with ZeRO, sharded; 4 + 4 + 8 in one process or DDP."""
    sizes = count_parameters(build_transformer(PipelineInfo.known(SMALL).transformer, prfl_recipe(SMALL)))
    one = Engine(num_gpus=1).held(sizes)
    assert sum(one.values()) == 16 * NUM_PARAMETERS
    assert sum(Engine(num_gpus=2).held(sizes).values()) == 16 * NUM_PARAMETERS
    zero2 = Engine(num_gpus=4, zero_stage=2).held(sizes)
    assert zero2["weights"] == 2 * NUM_PARAMETERS
    assert zero2["gradients"] + zero2["optimizer states"] == pytest.approx(16 * NUM_PARAMETERS / 4)
    zero3 = Engine(num_gpus=4, zero_stage=3).held(sizes)
    states = zero3["weights"] + zero3["gradients"] + zero3["optimizer states"]
    assert states == pytest.approx(18 * NUM_PARAMETERS / 4, rel=1e-3)
    offload = Engine(num_gpus=4, zero_stage=3, offload=True)
    assert offload.held(sizes)["optimizer states"] == 0
    assert offload.host_memory(sizes) == pytest.approx(18 * NUM_PARAMETERS / 4)


def test_sixteen_bytes_are_those_of_the_configurations() -> None:
    for name in ("zero2", "zero3", "zero3_hpz", "zero3_offload"):
        settings = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
        assert settings["communication_data_type"] == "fp32"


def test_disk_and_host_memory_at_14b() -> None:
    """A checkpoint has 171 GB of masters and moments and 57 GB of weights. Eight processes read 29 or 57 GB each."""
    options = {"gradient_checkpointing": True, "checkpoints_total_limit": 3}
    clip = {"height": 720, "width": 1280, "num_frames": 81}
    full = plan(prfl_recipe(LARGE, **options, context_parallel_degree=4), **clip, num_gpus=8, zero_stage=3)
    assert full.checkpoint == pytest.approx(171.5 + 57.2, rel=0.01)
    assert full.num_checkpoints == 4
    assert full.host_peak < 2
    lora = plan(prfl_recipe(LARGE, **options, lora_rank=32, offload_activations=True), **clip, num_gpus=8)
    assert lora.host_memory["loading"] == pytest.approx(28.6, rel=0.02)
    # 40 blocks of the generator and 8 of the reward model, 75,600 tokens of width 5,120 in half precision.
    assert lora.host_memory["block inputs"] == pytest.approx(48 * 75_600 * 5_120 * 2 / 1e9, rel=0.01)
    assert lora.checkpoint == pytest.approx(12 * lora.num_trained / 1e9)
    assert f"{8 * lora.host_peak:,.0f} for all processes" in str(lora)


def test_fits_and_prints() -> None:
    made = plan(prfl_recipe(SMALL, gradient_checkpointing=True, use_ema=True), **CLIP, num_gpus=8)
    assert made.fits
    assert made.num_parameters == made.num_trained == NUM_PARAMETERS
    assert made.num_tokens == 21 * 30 * 52
    assert made.peak == pytest.approx(sum(made.memory.values()) + max(made.phases.values()) + made.reserved)
    assert made.memory["averaged weights"] == pytest.approx(4 * NUM_PARAMETERS / 1e9)
    assert "fits" in str(made)
    assert "1,418,996,800" in str(made)
    # With the engine's masters in host memory, the average is there too.
    offloaded = plan(prfl_recipe(SMALL, use_ema=True), **CLIP, num_gpus=8, zero_stage=3, offload=True)
    assert offloaded.host_memory["averaged weights"] == pytest.approx(4 * NUM_PARAMETERS / 8 / 1e9)
    assert not offloaded.memory.get("averaged weights")
    read = json.loads(made.to_json())
    assert read["fits"]
    assert read["phases"] == made.phases
    assert made.changes == []


def test_each_option_saves_what_it_is_for() -> None:
    def peak(**options: object) -> float:
        engine = {name: options.pop(name) for name in ("num_gpus", "zero_stage") if name in options}
        # With two micro-batches the activations count, not the optimizer's step.
        training = prfl_recipe(SMALL, gradient_accumulation_steps=2, **options)
        made = plan(training, **CLIP, gpu_memory=1e6, **engine)
        return made.peak

    checkpointed = peak(gradient_checkpointing=True)
    assert checkpointed < peak(gradient_checkpointing=True, gradient_checkpointing_blocks=20) < peak()
    assert peak(gradient_checkpointing=True, offload_activations=True) < checkpointed
    assert peak(gradient_checkpointing=True, rerun_gradient_step=True) <= checkpointed
    assert peak(gradient_checkpointing=True, lora_rank=8) < checkpointed
    assert peak(gradient_checkpointing=True, offload_reward_model=True) <= checkpointed
    rerun = {"gradient_checkpointing": True, "rerun_gradient_step": True}
    assert peak(**rerun, offload_reward_model=True) < peak(**rerun)
    shared = [peak(gradient_checkpointing=True, num_gpus=4, zero_stage=stage) for stage in (0, 2, 3)]
    assert shared == sorted(shared, reverse=True)
    split = peak(gradient_checkpointing=True, num_gpus=4, zero_stage=3, context_parallel_degree=4)
    assert split < shared[-1]


def test_cheapest_change_is_enough_and_needed() -> None:
    made = plan(prfl_recipe(SMALL), **CLIP, num_gpus=4, gpu_memory=48)
    assert not made.fits
    assert made.changed_peak is not None
    assert made.changed_peak <= 48
    assert made.changes[0] == "--gradient_checkpointing true"
    assert "It fits with" in str(made)
    chosen = plan(prfl_recipe(SMALL, gradient_checkpointing=True), **CLIP, num_gpus=4, gpu_memory=48)
    if made.changes == ["--gradient_checkpointing true"]:
        assert chosen.peak == pytest.approx(made.changed_peak)
    else:
        assert not chosen.fits


def test_nothing_helps() -> None:
    made = plan(prfl_recipe(SMALL), **CLIP, gpu_memory=2)
    assert not made.fits
    assert made.changes == []
    assert "No change of options" in str(made)


def test_clips_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="context_parallel_degree"):
        plan(prfl_recipe(SMALL, context_parallel_degree=8), **CLIP, num_gpus=8)
    with pytest.raises(ValueError, match="num_gpus"):
        plan(prfl_recipe(SMALL, context_parallel_degree=4), **CLIP, num_gpus=6)
    with pytest.raises(ValueError, match="zero_stage"):
        plan(prfl_recipe(SMALL), **CLIP, offload=True)


def test_reward_training_is_planned() -> None:
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    bce, bt = (plan(reward_recipe(SMALL, loss=loss, **options), **CLIP, num_gpus=2) for loss in ("bce", "bt"))
    assert bce.command == "train_reward"
    assert bce.num_trained < bce.num_parameters
    assert bt.teraflops["reward"] == pytest.approx(2 * bce.teraflops["reward"], rel=0.01)
    assert bt.peak > bce.peak


@pytest.mark.parametrize("field", dataclasses.fields(Engine), ids=lambda field: field.name)
def test_engine_is_hashable_and_checked(field: dataclasses.Field) -> None:
    assert hash(Engine()) == hash(dataclasses.replace(Engine(), **{field.name: getattr(Engine(), field.name)}))
    with pytest.raises(ValueError, match="zero_stage"):
        Engine(zero_stage=1)


A14B = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def test_experts() -> None:
    """Weights of one or two experts, one of them perhaps frozen, and chains up to the steps of the trained ones."""
    # In one test, because what they simulate is the same, and is kept.
    for expert in ("high_noise", "low_noise", "both"):
        check_expert(expert)


def check_expert(expert: str) -> None:
    options = {"expert": expert, "lora_rank": 32, "gradient_checkpointing": True, "sampler_flow_shift": 12.0}
    one = plan(prfl_recipe(lora_rank=32, gradient_checkpointing=True), **CLIP)
    made = plan(prfl_recipe(A14B, **options), **CLIP)
    count = 2 if expert == "both" else 1
    assert (made.num_parameters, made.num_trained) == (count * one.num_parameters, count * one.num_trained)
    assert made.memory["weights"] == pytest.approx(count * one.memory["weights"])
    frozen = made.memory.get("frozen expert", 0.0)
    assert frozen == pytest.approx(one.memory["weights"] - 4 * one.num_trained / 1e9 if expert == "low_noise" else 0.0)

    # sigma = 12 u / (1 + 11 u) at the sampler's 40 values of u, compared as the pipelines do.
    sigmas = np.linspace(1, 1 / 1000, 41)[:-1]
    is_high = (1000 * (12 * sigmas / (1 + 11 * sigmas))).astype(int) >= 875
    last = {"high_noise": is_high.sum() - 1, "low_noise": 38, "both": 38}[expert]
    first = is_high.sum() if expert == "low_noise" else 0
    mean_length = np.mean(range(first, last + 1))
    rollout = one.teraflops["rollout"] / np.mean(range(39))
    assert made.teraflops["rollout"] == pytest.approx(mean_length * rollout)

    split = plan(prfl_recipe(A14B, **options, shard_frozen_expert=expert != "both"), **CLIP, num_gpus=8)
    assert split.memory.get("frozen expert", 0.0) == pytest.approx(frozen / 8)
    sampled = plan(prfl_recipe(A14B, **options, validation_dataset="-"), **CLIP)
    assert ("frozen expert" in sampled.memory) == (expert != "both")


def test_starts_of_chained_steps_are_on_the_gpu_or_offloaded() -> None:
    """Float32 latents, the solver's last sample and two model outputs of each of four steps: 16 x 2 x 12 x 12 latents."""
    options = {"lora_rank": 8, "gradient_checkpointing": True, "num_chained_steps": 4}
    size = 4 * 4 * 4 * (16 * 2 * 12 * 12) / 1e9
    clip = {"height": 96, "width": 96, "num_frames": 5}
    kept = plan(prfl_recipe(SMALL, **options), **clip)
    assert kept.memory["chained steps"] == pytest.approx(size)
    offloaded = plan(prfl_recipe(SMALL, **options, offload_activations=True), **clip)
    assert "chained steps" not in offloaded.memory
    assert offloaded.host_memory["chained steps"] == pytest.approx(size)


def test_two_experts_need_a_choice() -> None:
    with pytest.raises(ValueError, match=r"`expert` must be high_noise, low_noise or both, Wan-AI/Wan2.2-T2V-A14B"):
        plan(prfl_recipe(A14B), **CLIP)


def test_a_first_frame_gives_every_token_a_timestep() -> None:
    """TI2V 5B has one projected timestep per token: six vectors of 3072 float32 numbers."""
    training = prfl_recipe("Wan-AI/Wan2.2-TI2V-5B-Diffusers", lora_rank=16, gradient_checkpointing=True)
    clip = {"height": 704, "width": 1280, "num_frames": 121}
    without, with_frame = (plan(training, **clip, first_frame=given) for given in (False, True))
    assert with_frame.num_tokens == without.num_tokens == 31 * 22 * 40
    each = 6 * 3072 * 4 * without.num_tokens / 1e9
    assert with_frame.phases["gradient step"] - without.phases["gradient step"] > each
    assert 1.0 < sum(with_frame.teraflops.values()) / sum(without.teraflops.values()) < 1.03


def test_validation_videos_are_decoded_by_the_pipelines_own_vae(tmp_path: Path) -> None:
    """The residual VAE of TI2V 5B has 704.7 M parameters and a stride of 16 pixels, Wan 2.1's 126.9 M and 8."""
    options: dict[str, Any] = {"validation_dataset": "v", "validation_videos": 1, "vae_tiling": "off"}
    clip = {"height": 704, "width": 1280, "num_frames": 121, "gpu_memory": 1e6}
    needs = {}
    for name in ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", SMALL):
        made = plan(prfl_recipe(name, lora_rank=8, gradient_checkpointing=True, **options), **clip)
        needs[name] = made.memory["VAE"], made.phases["validation videos"]
    pixels = 704 * 1280 / 1e9
    assert needs["Wan-AI/Wan2.2-TI2V-5B-Diffusers"] == pytest.approx((2.8188, pixels * (21_530 + 12 * 121)), rel=1e-4)
    assert needs[SMALL] == pytest.approx((0.50757, pixels * (19_445 + 12.5 * 121)), rel=1e-4)
    # As many channels as TI2V 5B, but another VAE.
    channels = {"in_channels": 48, "out_channels": 48}
    vae = {"z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    build_pipeline(transformer_config=channels, vae_config=vae).save_pretrained(tmp_path)
    small = {"height": 32, "width": 32, "num_frames": 5}
    made = plan(prfl_recipe(str(tmp_path), **options), **small)
    assert made.num_tokens == 2 * 2 * 2
    assert made.memory["VAE"] == pytest.approx(0.50757, rel=1e-4)


@pytest.mark.parametrize("model", ["Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", SMALL])
def test_a_first_frame_is_refused_for_a_model_that_takes_none(model: str) -> None:
    with pytest.raises(ValueError, match="`first_frame` must be false"):
        plan(prfl_recipe(model), **CLIP, first_frame=True)


def test_a_reward_model_in_host_memory_is_on_the_gpu_only_for_the_reward() -> None:
    options = {"gradient_checkpointing": True}
    held, away = (
        plan(prfl_recipe(SMALL, **options, offload_reward_model=offload), **CLIP, gpu_memory=1e6)
        for offload in (False, True)
    )
    size = held.memory["reward model"]
    assert size > 0
    assert sum(away.host_memory.values()) - sum(held.host_memory.values()) == pytest.approx(size)
    assert sum(held.memory.values()) - sum(away.memory.values()) == pytest.approx(size)
    assert away.phases["reward"] - held.phases["reward"] == pytest.approx(size)
    assert {name: value for name, value in away.phases.items() if name != "reward"} == {
        name: value for name, value in held.phases.items() if name != "reward"
    }


def test_the_monitor_takes_memory_of_its_reward_models_and_of_the_base() -> None:
    options: dict[str, Any] = {"validation_dataset": "v", "num_validation_samples": 4}
    plain, watched = (
        plan(prfl_recipe(SMALL, **options, monitor_reward_models=models), **CLIP, gpu_memory=1e6)
        for models in ([], ["a", "b"])
    )
    more = sum(watched.memory.values()) - sum(plain.memory.values())
    assert more == pytest.approx(2 * plain.memory["reward model"])
    # Samples, and velocities at three noise levels, of 16 channels of 21 x 60 x 104, in half precision.
    base = 4 * 4 * 2 * 16 * 21 * 60 * 104 / 1e9
    assert sum(watched.host_memory.values()) - sum(plain.host_memory.values()) == pytest.approx(base)
    away = prfl_recipe(SMALL, **options, monitor_reward_models=["a", "b"], offload_reward_model=True)
    made = plan(away, **CLIP, gpu_memory=1e6)
    assert sum(plain.memory.values()) - sum(made.memory.values()) == pytest.approx(plain.memory["reward model"])


def test_every_rank_writes_its_rollouts_into_a_checkpoint() -> None:
    options: dict[str, Any] = {"lora_rank": 8, "num_inference_steps": 20}
    reused = {"rollout_interval": 4, "rollout_buffer_size": 3}
    plain, kept = (
        plan(prfl_recipe(SMALL, **options, **more), **CLIP, num_gpus=2, gpu_memory=1e6) for more in ({}, reused)
    )
    # Latents and velocities of 19 states, of 16 channels of 21 x 60 x 104, in half precision.
    rollouts = 3 * 19 * 2 * 2 * 16 * 21 * 60 * 104 / 1e9
    assert sum(kept.host_memory.values()) - sum(plain.host_memory.values()) == pytest.approx(rollouts)
    assert kept.checkpoint is not None
    assert plain.checkpoint is not None
    assert kept.checkpoint - plain.checkpoint == pytest.approx(2 * rollouts)


def test_one_gpu_is_told_to_keep_the_reward_model_in_host_memory() -> None:
    options = {"gradient_checkpointing": True, "rerun_gradient_step": True}
    away = plan(prfl_recipe(SMALL, **options, offload_reward_model=True), **CLIP, gpu_memory=1e6)
    made = plan(prfl_recipe(SMALL, **options), **CLIP, gpu_memory=away.peak * 1.001)
    assert not made.fits
    assert made.changes == ["--offload_reward_model true"]


@pytest.mark.parametrize(
    ("options", "num_gpus"),
    [
        ({"lora_rank": 8, "reward_model_quantization": "int8"}, 1),
        ({"lora_rank": 8, "base_quantization": "int8"}, 2),
        ({"lora_rank": 8, "lora_dropout": 0.1}, 1),
        ({"update_schedule": "flow_matching"}, 1),
        ({"compile": True}, 2),
    ],
)
def test_what_a_recipe_excludes_is_not_advised(options: dict[str, Any], num_gpus: int) -> None:
    """The configs refuse a reward model in 8 bits in host memory, quantised weights under ZeRO, and so on."""
    clip = {"height": 96, "width": 96, "num_frames": 5}
    made = plan(prfl_recipe(SMALL, **options), **clip, num_gpus=num_gpus, gpu_memory=1)
    assert not made.fits
    assert made.changes == []


def test_what_the_engine_excludes_is_refused() -> None:
    with pytest.raises(ValueError, match="`compile` must be false under ZeRO, got True"):
        plan(prfl_recipe(SMALL, compile=True), **CLIP, num_gpus=2, zero_stage=2)
