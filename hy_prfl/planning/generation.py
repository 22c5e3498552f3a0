"""`plan` for `generate`: forwards, time and memory of candidates and reward guidance, compared with plain sampling."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from ..configs.base import check
from ..configs.generate import GenerateConfig
from ..configs.keep import num_forwards, num_scores, parse_keep
from ..formats.pipeline_info import PipelineInfo
from ..runtime.vae_tiling import pass_memory, tiled_decoding_memory
from .estimate import VAE_BYTES
from .models import (
    Counting,
    freeze,
    generator_sizes,
    prfl_recipe,
    reward_model_config,
    reward_model_sizes,
)
from .workloads import Numerics, Shape, generator_phases, reward_phases, scoring_phase


GIGA, TERA = 1e9, 1e12
# Configuration of UMT5-XXL, the text encoder of every Wan pipeline.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


@dataclass(frozen=True)
class SamplingCost:
    """
    Cost of one video. A batched forward counts once per candidate.

    Args:
        forwards (`int`):
            Forwards of the generator; two per step with classifier-free guidance.
        reward_forwards, reward_backwards (`int`):
            Forwards and backwards of the reward model.
        teraflops (`float`):
            10^12 FLOPs, without text encoder and VAE.
        seconds (`float`):
            Time of these FLOPs at the given rate.
        peak (`float`):
            Peak memory of the GPU in gigabytes (10^9 bytes).
    """

    forwards: int
    reward_forwards: int
    reward_backwards: int
    teraflops: float
    seconds: float
    peak: float


@dataclass(frozen=True)
class GenerationPlan:
    """
    Cost of a recipe of `generate`, compared with plain sampling.

    Args:
        model (`str`):
            The pipeline.
        num_tokens (`int`):
            Tokens per video.
        plain, setting (`SamplingCost`):
            Costs of one sample without a reward model, and of a video of the recipe.
        gpu_memory (`float`):
            Memory of the GPU in gigabytes.
    """

    model: str
    num_tokens: int
    plain: SamplingCost
    setting: SamplingCost
    gpu_memory: float

    @property
    def fits(self) -> bool:
        """Whether the recipe fits into the memory of the GPU."""
        return self.setting.peak <= self.gpu_memory

    def to_json(self) -> str:
        """The plan as a JSON object."""
        return json.dumps({"command": "generate", **dataclasses.asdict(self), "fits": self.fits}, indent=2)

    def __str__(self) -> str:
        lines = [
            f"generate with {self.model}: {self.num_tokens:,} tokens a video",
            "",
            f"{'for a video':<28}{'plain':>12}{'this':>12}{'ratio':>10}",
        ]
        for name, label in (
            ("forwards", "forwards of the generator"),
            ("reward_forwards", "forwards of the reward"),
            ("reward_backwards", "backwards of the reward"),
            ("teraflops", "TFLOP"),
            ("seconds", "seconds, compute only"),
            ("peak", "GB of the GPU, at most"),
        ):
            before, after = getattr(self.plain, name), getattr(self.setting, name)
            ratio = f"{after / before:10.2f}" if before else ""
            lines.append(f"  {label:<26}{before:>12,.1f}{after:>12,.1f}{ratio}")
        lines += ["", f"{'fits' if self.fits else 'DOES NOT FIT'} into {self.gpu_memory:g} GB"]
        return "\n".join(lines)


def plan_generation(
    config: GenerateConfig,
    *,
    gpu_memory: float = 80.0,
    tflops: float = 989.0,
    utilization: float = 0.4,
    reserved: float = 3.0,
    reward_config: Mapping[str, Any] | None = None,
) -> GenerationPlan:
    """
    Plan a recipe of `generate`. Needs no weights and no GPU. LoRAs cost almost nothing and are left out.

    Args:
        gpu_memory, tflops, utilization, reserved (`float`):
            As in [`~hy_prfl.planning.plan`].
        reward_config (`Mapping[str, Any]`, *optional*):
            Configuration of the reward model; one made from the generator's first 8 blocks if left out.

    Raises:
        ValueError: If the VAE cannot encode the size, or if the recipe has a step cache: what it saves depends on the
            video.
    """
    check(config.step_cache == "none", "step_cache", config.step_cache, "none: what it saves depends on the video")
    path, revision = config.pretrained_model_name_or_path, config.revision
    info = PipelineInfo.known(path, revision)
    generator, stride = info.transformer, info.vae_stride
    for name, multiple in (("height", 2 * stride[1]), ("width", 2 * stride[2])):
        value = getattr(config, name)
        check(value % multiple == 0, name, value, f"a multiple of {multiple}")
    latents = ((config.num_frames - 1) // stride[0] + 1, config.height // stride[1], config.width // stride[2])
    reward = dict(reward_config or reward_model_config(generator))
    dtype = getattr(torch, config.dtype)
    numerics = Numerics(frozen=dtype, trained=dtype, compute=dtype, autocast=False, keeps_in_fp32=True, on_gpu=True)
    rate = tflops * utilization * TERA
    counting = Counting(numerics.frozen, numerics.frozen, keeps_in_fp32=True, persistence_threshold=0)
    weights = {
        "generator": float(generator_sizes(freeze(generator), None, counting).num_bytes),
        "reward": float(reward_model_sizes(freeze(reward), None, counting).num_bytes),
        "text": _text_encoder_bytes(dtype),
        "vae": float(VAE_BYTES[info.has_residual_vae]),
    }
    plain = dataclasses.replace(config, **_PLAIN)

    def cost(setting: GenerateConfig) -> SamplingCost:
        return _cost(setting, info, reward, numerics, latents, weights, rate, reserved)

    return GenerationPlan(
        model=path,
        num_tokens=Shape(1, latents).num_tokens(generator["patch_size"]),
        plain=cost(plain),
        setting=cost(config),
        gpu_memory=gpu_memory,
    )


_TRAINING = prfl_recipe(())
_PLAIN: dict[str, Any] = {
    "reward_model": None,
    "reward_model_revision": None,
    "reward_dtype": None,
    "num_candidates": 1,
    "keep": None,
    "resample": False,
    "reward_guidance": None,
    "reward_guidance_steps": None,
    "calibrate": False,
}


def _cost(
    config: GenerateConfig,
    info: PipelineInfo,
    reward: Mapping[str, Any],
    numerics: Numerics,
    latents: tuple[int, int, int],
    weights: Mapping[str, float],
    rate: float,
    reserved: float,
) -> SamplingCost:
    keep, number, num_steps = parse_keep(config.keep), config.num_candidates, config.num_inference_steps
    steps = num_forwards(keep, num_candidates=number, num_inference_steps=num_steps, resample=config.resample)
    scores = 0
    if number > 1:
        scores = num_scores(
            keep, num_candidates=number, num_final_timesteps=len(config.final_timesteps), resample=config.resample
        )
    if config.calibrate:
        scores += number * (num_steps - 1)
    guided = 0
    if config.reward_guidance_steps is not None:
        guided = _candidates_between(config, *config.reward_guidance_steps)
    forwards = steps * (2 if config.guidance_scale > 1 else 1)
    batch = min(number, config.candidate_batch_size)
    one, several = (Shape(size, latents, config.max_sequence_length) for size in (1, batch))
    step = generator_phases(info.transformer, _TRAINING, numerics, one)["rollout"]
    flops = forwards * step.flops
    phases = {"generator": generator_phases(info.transformer, _TRAINING, numerics, several)["rollout"].peak}
    if config.uses_reward:
        flops += (scores + guided) * scoring_phase(reward, numerics, one).flops
        phases["reward"] = scoring_phase(reward, numerics, several).peak
    if guided:
        guide = reward_phases(reward, _TRAINING, numerics, several)
        flops += guided * reward_phases(reward, _TRAINING, numerics, one)["backward"].flops
        phases["reward"] = max(phases["reward"], guide["forward"].peak, guide["backward"].peak)
    size = {"height": config.height, "width": config.width, "num_frames": config.num_frames}
    decoding = pass_memory({"is_residual": info.has_residual_vae}, "decode", **size)
    phases["vae"] = decoding if config.vae_tiling == "off" else min(decoding, tiled_decoding_memory(**size))
    # Noisy and predicted latents of all candidates, and the sampler's history.
    held = 6 * 4 * number * info.transformer["out_channels"] * latents[0] * latents[1] * latents[2]
    peak = _peak(config, phases, weights, 2 if info.has_two_experts else 1) + held + reserved * GIGA
    return SamplingCost(forwards, scores + guided, guided, flops / TERA, flops / rate, peak / GIGA)


def _candidates_between(config: GenerateConfig, first: int, last: int) -> int:
    """Sum over the steps `first` to `last` of the number of candidates at each step."""
    keep, number = parse_keep(config.keep), config.num_candidates
    counts = []
    for step in range(1, config.num_inference_steps + 1):
        counts.append(number)
        number = next((each.num_kept * (2 if config.resample else 1) for each in keep if each.step == step), number)
    return sum(counts[first - 1 : last])


def _peak(
    config: GenerateConfig, phases: Mapping[str, float], weights: Mapping[str, float], num_experts: int
) -> float:
    """Bytes of the largest phase and of the weights that `cpu_offload` leaves on the GPU meanwhile."""
    needed = ["generator", "vae", *(["reward"] if config.uses_reward else [])]
    if config.cpu_offload == "none":
        held = sum(weights[name] for name in (*needed, "text")) + (num_experts - 1) * weights["generator"]
        return held + max(phases.values())
    if config.cpu_offload == "model":
        # Each model is moved off the GPU before the next one is loaded, but the generator stays with the reward model.
        at_work = {name: weights[name] + phases[name] for name in ("generator", "vae")}
        if config.uses_reward:
            at_work["reward"] = weights["generator"] + weights["reward"] + phases["reward"]
        return max(*at_work.values(), weights["text"])
    return max(phases.values()) + (weights["reward"] if config.uses_reward else 0.0)


@functools.cache
def _text_encoder_bytes(dtype: torch.dtype) -> float:
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    return float(sum(parameter.numel() for parameter in encoder.parameters()) * dtype.itemsize)
