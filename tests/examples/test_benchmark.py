"""The benchmark's smallest cases, and checks of its baseline and counts against torch itself."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from examples.benchmark.benchmark import in_process_of_its_own, main, prepare_inputs
from examples.benchmark.cases import (
    CACHED,
    FLOW,
    FOUR_STEPS,
    NO_CHECKPOINTING,
    PRFL,
    PRFL_REWARD,
    REUSED,
    RGB_ALL,
    RGB_FIRST,
    Case,
    all_cases,
    anywhere,
    early,
    late,
)
from examples.benchmark.inputs import write_models, write_rows
from examples.benchmark.measuring import Measured, Measurement, Recorder, measure
from examples.benchmark.report import ratios, write_report
from examples.benchmark.rgb_refl import PixelReward, RGBReFLTrainer, decode_all_frames, decode_first_frame
from examples.benchmark.sizes import PUBLISHED_DECODING_SHARES, SIZES, Clip, decoding_share, small_size
from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.losses import flow_matching_loss, reward_feedback_loss
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.rollout.sampling import predict_velocity


ROOT = Path(__file__).parents[2]
CLIP = Clip(9, 32, 32)
RUN_TWICE = "gradient step run twice"
SIZE = small_size(num_heads=1, num_layers=5, vae_width=4, base=CLIP, longer=(), larger=())
aten = torch.ops.aten
COUNT_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def case(method: str, switch: str = "") -> Case:
    return Case("test", SIZE, CLIP, method, switch, num_inference_steps=8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "models"
    prepare_inputs(case(PRFL), folder)
    return folder


@pytest.fixture
def vae(inputs: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(inputs / "pipeline", subfolder="vae").requires_grad_(False)


def gradient_of(decode: Any, latents: torch.Tensor) -> torch.Tensor:
    leaf = latents.clone().requires_grad_()
    (grad,) = torch.autograd.grad(decode(leaf).square().sum(), leaf)
    return grad


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("decode", "num_frames"), [(decode_first_frame, 1), (decode_all_frames, 3)])
def test_decoding_is_the_vaes_own(vae: AutoencoderKLWan, decode: Any, num_frames: int, checkpointing: bool) -> None:
    latents = torch.randn(1, *CLIP.latents_shape)
    torch.testing.assert_close(
        decode(vae, latents, checkpointing=checkpointing), vae.decode(latents[:, :, :num_frames]).sample
    )
    torch.testing.assert_close(
        gradient_of(lambda leaf: decode(vae, leaf, checkpointing=checkpointing), latents),
        gradient_of(lambda leaf: vae.decode(leaf[:, :, :num_frames]).sample, latents),
    )


@pytest.mark.parametrize("method", [RGB_FIRST, RGB_ALL])
def test_rgb_refl_has_the_gradient_of_plain_autograd(inputs: Path, tmp_path: Path, method: str) -> None:
    """RGB ReFL's gradient from one graph of noise, chain, predicted latents, frames, reward and one `backward()`."""
    trainer = dataclasses.replace(case(method), switch="no activation checkpointing" if method == RGB_ALL else "")
    trainer = trainer.trainer(inputs, tmp_path, Measured)
    trainer.start_streams()
    batch = next(trainer.reward_batches).to(torch.device("cpu"))
    conditioning = Conditioning.of(batch)
    step = next(trainer.roll_out(batch.latents_shape, conditioning, 0))
    feedback = trainer.reward.differentiate(step, conditioning)
    latents_grad, loss, logits = feedback.latents_grad, feedback.loss, feedback.logits
    (surrogate,) = step.surrogates(latents_grad)
    surrogate.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.unwrapped.named_parameters()}
    trainer.unwrapped.zero_grad()

    scheduler = UniPCMultistepScheduler.from_pretrained(inputs / "pipeline", subfolder="scheduler")
    scheduler.set_timesteps(8)
    latents = torch.stack([torch.randn(CLIP.latents_shape, generator=each) for each in trainer.generators(2, 0, 1)])
    step = late(8, 1)
    with torch.no_grad():
        for timestep in scheduler.timesteps[:step]:
            velocity = predict_velocity(trainer.unwrapped, latents, timestep, conditioning)
            latents = scheduler.step(velocity, timestep, latents).prev_sample
    velocity = predict_velocity(trainer.unwrapped, latents, scheduler.timesteps[step], conditioning)
    clean = latents - scheduler.sigmas[step] * velocity
    reward: PixelReward = trainer.reward.models[0]
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(reward.vae.config[name]).view(shape) for name in ("latents_mean", "latents_std"))
    frames = reward.vae.decode((clean * std + mean)[:, :, : 1 if method == RGB_FIRST else None]).sample
    images = frames[0, :, ::8].transpose(0, 1)
    images = torch.nn.functional.interpolate(images, size=(56, 56), mode="bilinear", antialias=True)
    embeds = reward.network(((images + 1) / 2 - reward.mean) / reward.std).image_embeds
    cosine = torch.nn.functional.normalize(embeds, dim=-1) @ torch.nn.functional.normalize(reward.text_embeds, dim=0)
    expected_logits = 10 * cosine.mean(dim=0, keepdim=True)
    expected = reward_feedback_loss(expected_logits, form="logsigmoid", scale=1.0, target=2.0)
    expected.backward()

    torch.testing.assert_close(logits, expected_logits.detach())
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in trainer.unwrapped.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3 * largest)
    assert any(grad.abs().max() > 1e-6 for grad in found.values())
    assert all(parameter.grad is None for parameter in reward.parameters())


def count(function: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=COUNT_ATTENTION) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.fixture
def counted(inputs: Path, vae: AutoencoderKLWan) -> dict[str, int]:
    """FLOPs of the parts of an update by torch's counter."""
    transformer = WanTransformer3DModel.from_pretrained(inputs / "pipeline", subfolder="transformer")
    transformer.enable_gradient_checkpointing()
    transformer.train()
    reward_model = WanRewardModel.from_pretrained(inputs / "reward").requires_grad_(False)
    reward_model.enable_gradient_checkpointing()
    reward_model.train()
    latents, text = torch.randn(1, *CLIP.latents_shape), torch.randn(1, 16, 32)
    time = torch.tensor([500.0])

    def forward() -> None:
        with torch.no_grad():
            predict_velocity(transformer, latents, time, Conditioning(text))

    def generator() -> None:
        flow_matching_loss(predict_velocity(transformer, latents, time, Conditioning(text)), latents).backward()

    def reward() -> None:
        # Not a leaf itself: the counter's hooks would fail.
        reward_model(latents.clone().requires_grad_() * 1, time, text).logits.sum().backward()

    def pixels(decodes: Any) -> None:
        pixel_reward = PixelReward(vae, SIZE.image_reward, decodes=decodes, checkpointing=True)
        pixel_reward(latents.clone().requires_grad_() * 1, text).sum().backward()

    return {
        "forward": count(forward),
        "generator": count(generator),
        "reward": count(reward),
        "first": count(lambda: pixels("first")),
    }


@pytest.fixture(scope="module")
def measured(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    """Measurements by the name of the method or the switch."""
    results = {}
    switched = [case(PRFL, switch) for switch in (RUN_TWICE, REUSED, CACHED)]
    for each in (case(PRFL), case(FLOW), case(RGB_FIRST), *switched, case(PRFL_REWARD, FOUR_STEPS)):
        trainer = each.trainer(inputs, tmp_path_factory.mktemp("run"), Measured)
        results[each.switch or each.method] = measure(trainer, num_updates=1)
    return results


def test_flops_and_calls_of_an_update(measured: dict[str, Measurement], counted: dict[str, int]) -> None:
    """FLOPs of an update are exactly those of its rollout, gradient step, reward and flow-matching update."""
    forward, step, reward, pixels = (counted[name] for name in ("forward", "generator", "reward", "first"))
    expected = {
        # FLOPs, calls of the models, and backward passes of generator and reward model.
        PRFL: (3 * forward + 2 * step + reward, 1 + 4 + 1, 3),
        FLOW: (step, 1, 1),
        RGB_FIRST: (6 * forward + 2 * step + pixels, 1 + 7 + 1, 3),
        RUN_TWICE: (4 * forward + 2 * step + reward, 1 + 5 + 1, 3),
        # Seven states of a chain of eight steps, for eight updates.
        REUSED: (7 / 8 * forward + 2 * step + reward, 1 + 7 / 8 + 1 + 1, 3),
        # Step 3 takes gradient; of those before it, step 2 is extrapolated.
        CACHED: (2 * forward + 2 * step + reward, 1 + 3 + 1, 3),
        FOUR_STEPS: (2 * forward + 4 * (step + reward), 6 + 4, 8),
    }
    for name, (flops, num_forwards, num_backwards) in expected.items():
        assert measured[name].flops == pytest.approx(flops, rel=1e-3), name
        assert (measured[name].num_forwards, measured[name].num_backwards) == (num_forwards, num_backwards), name


def test_time_and_memory_of_an_update(inputs: Path, measured: dict[str, Measurement]) -> None:
    for result in measured.values():
        assert len(result.seconds) == 1
        assert 0 < result.optimizer < result.overhead < 1
    # Weights, gradients and two moments of Adam. The clip is small, so the smallest method needs little more.
    parameters = WanTransformer3DModel.from_pretrained(inputs / "pipeline", subfolder="transformer").num_parameters()
    assert 16 * parameters < measured[FLOW].peak_bytes < 24 * parameters
    assert measured[FLOW].peak_bytes == min(result.peak_bytes for result in measured.values())


def test_short_updates_are_timed_for_a_while(inputs: Path, tmp_path: Path) -> None:
    result = measure(case(FLOW).trainer(inputs, tmp_path, Measured), num_updates=1, min_seconds=1.0)
    assert len(result.seconds) > 1
    assert sum(result.seconds[:-1]) < 1.0 <= sum(result.seconds)


def test_every_switch_is_an_option_of_the_trainer() -> None:
    """All cases of each device type have valid options: the configuration checks them."""
    for device in ("cpu", "cuda"):
        cases = all_cases({"test": SIZE}, device=torch.device(device), num_inference_steps=8)
        assert len({each.label for each in cases}) == len(cases)
        for each in cases:
            config = PRFLTrainingConfig(
                output_dir="-", pretrained_model_name_or_path="-", train_dataset="-", reward_model="-", **each.options
            )
            assert config.gradient_checkpointing == (each.switch != NO_CHECKPOINTING)


def test_steps_are_the_mean_of_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_gradient_steps in (1, 4):
        draws = [torch.randperm(39, generator=generator)[:num_gradient_steps].max() for _ in range(4000)]
        mean = torch.stack(draws).float().mean()
        assert anywhere(40, num_gradient_steps) == pytest.approx(float(mean), abs=0.6)
        draws = [torch.randperm(13, generator=generator)[:num_gradient_steps].max() for _ in range(4000)]
        assert early(40, num_gradient_steps) == pytest.approx(float(torch.stack(draws).float().mean()), abs=0.6)
    assert late(40, 1) == sum(range(26, 40)) // 14


@pytest.mark.parametrize("name", ["tiny", "mid"])
def test_vae_is_in_proportion(name: str) -> None:
    """No other width of the VAE is closer to the decoding share of the published size."""
    size, share = SIZES[name], PUBLISHED_DECODING_SHARES[{"tiny": "1.3b", "mid": "14b"}[name]]

    def distance(width: int) -> float:
        ratio = decoding_share(dataclasses.replace(size, vae={"base_dim": width})) / share
        return max(ratio, 1 / ratio)

    width = size.vae["base_dim"]
    assert all(distance(width) <= distance(other) for other in (width - 1, width + 1) if other >= 1)


def row(method: str, seconds: float, gigabytes: float, **more: Any) -> dict[str, Any]:
    schedule = "reward" if "reward only" in method else "alternate"
    return {
        "size": "tiny", "clip": "9x32x32", "num_tokens": 48, "method": method, "switch": "", "num_parameters": 1000,
        "options": {"update_schedule": schedule}, "matmul_flops": 1e9, "seconds": [9.0, seconds], "flops": 10**9,
        "peak_bytes": gigabytes * 1e9, "overhead": 0.04, "optimizer": 0.01, **more,
    }  # fmt: skip


def test_report(tmp_path: Path) -> None:
    """Fastest updates, ratios and their bounds for made-up measurements, against figures computed by hand."""
    four = {"switch": "4 gradient steps", "options": {"update_schedule": "reward", "num_gradient_steps": 4}}
    rows = [
        row(PRFL, 2.0, 1.0, planned_bytes=1.11e9, planned_flops=1e9),
        row(RGB_FIRST, 2.9, 1.1, matmul_flops=2e9),
        row("PRFL, reward only", 1.0, 1.0, overhead=0.06, planned_bytes=0.95e9, planned_flops=0.99e9),
        row("RGB ReFL, first frame, reward only", 1.5, 1.0),
        row("PRFL, reward only", 2.0, 1.0, **four),
        {**row(PRFL, 1.0, 1.0, switch="attention flash"), "unavailable": "not here"},
    ]
    machine = {
        "cpu": "a", "num_threads": 1, "devices": {"names": []}, "python": "3", "libraries": {}, "git": None,
    }  # fmt: skip
    write_report(
        tmp_path, rows, machine=machine, timing={"num_updates": 2, "min_seconds": 0.0}, decoding_shares={"tiny": 0.2}
    )
    report = json.loads((tmp_path / "results.json").read_text())
    found = {each["name"]: round(each["value"], 3) for each in report["ratios"]}
    assert found == {
        "faster than RGB ReFL, first frame": 1.45,
        "fewer FLOPs than RGB ReFL, first frame": 1.0,
        "less memory than RGB ReFL, first frame": 1.1,
        "faster than RGB ReFL, first frame, both without flow matching": 1.5,
        "more reward gradients a second from 4 gradient steps": 2.0,
        "framework overhead": 0.04,
        "planned memory, over measured": 1.11,
        "planned FLOPs, over measured": 0.99,
    }
    assert report["cases"][0]["share_of_matmul"] == pytest.approx(1e9 / 2.0 / 2e9)
    page = (tmp_path / "results.md").read_text()
    assert "| PRFL, reward only | 1 | 2.90 x | 1.00 x | 1 | 1.10 x | 0.950 x |" in page
    assert "| attention flash | PRFL | not here |" in page
    assert "Fastest of at least 2 updates and 0 seconds." in page
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("time.png", "memory.png"))
    assert list(ratios(rows[:1]))[0]["name"] == "framework overhead"


def test_command_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only cases without a result are measured; with another setting all are measured again."""
    monkeypatch.chdir(ROOT)

    def run(*options: str) -> dict[str, Any]:
        where = [f"--output_dir={tmp_path}", "--sizes=tiny", "--base_clip_only"]
        main([*where, "--num_updates=1", "--min_seconds=0", "--num_inference_steps=8", "--num_threads=1", *options])
        return json.loads((tmp_path / "results.json").read_text())

    run("--cases", FLOW)
    (path,) = (tmp_path / "cases").glob("*.json")
    kept = json.loads(path.read_text())
    kept["result"]["seconds"] = [123.0]
    path.write_text(json.dumps(kept))
    report = run("--cases", FLOW, "no activation checkpointing")
    assert [each["switch"] for each in report["cases"]] == ["", "no activation checkpointing"]
    assert report["cases"][0]["seconds_per_update"] == 123.0
    assert report["cases"][1]["seconds_per_update"] != 123.0
    assert not list(tmp_path.rglob("*.tmp"))
    kept["settings"]["machine"]["num_threads"] = 3
    path.write_text(json.dumps(kept))
    assert run("--cases", FLOW)["cases"][0]["seconds_per_update"] != 123.0
    with pytest.raises(ValueError, match="`cases` must be of"):
        run("--cases", "sparkling")


def fail() -> None:
    raise FloatingPointError("no number")


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no number"):
        in_process_of_its_own(tmp_path / "log", fail)


def test_what_is_not_for_rgb_refl_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(case(PRFL).trainer(inputs, tmp_path, Measured).config, rerun_gradient_step=True)
    with pytest.raises(ValueError, match="rerun_gradient_step"):
        RGBReFLTrainer.from_config(
            config, build_reward=partial(PixelReward, image_reward=SIZE.image_reward, decodes="first")
        )


def test_a_run_that_ends_too_early_is_an_error(inputs: Path, tmp_path: Path) -> None:
    trainer = case(FLOW).trainer(inputs, tmp_path, Measured)
    trainer.max_train_steps = 0
    with pytest.raises(RuntimeError, match="before everything was measured"):
        measure(trainer, num_updates=1)
    assert trainer.recorder.index == -1
    assert isinstance(trainer.recorder, Recorder)


def test_inputs_fit_together(tmp_path: Path) -> None:
    """Models are written in a type, with rows that the trainer accepts."""
    write_models(tmp_path, num_reward_layers=1, dtype=torch.bfloat16, num_layers=2)
    write_rows(tmp_path, latents_shape=(16, 2, 4, 4), num_rows=2)
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    assert transformer.config.num_layers == 2
    assert (tmp_path / "data").is_dir()
    assert WanRewardModel.from_pretrained(tmp_path / "reward").config.num_layers == 1
