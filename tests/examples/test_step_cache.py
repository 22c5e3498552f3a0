"""Skipped steps of a rollout on the generator of the shapes: the figures of `docs/prfl.md`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanPipeline

from examples.shapes.clips import split_captions
from hy_prfl.models.conditioning import Conditioning
from hy_prfl.models.loading import load_scheduler
from hy_prfl.rollout.chain import record_states


PRETRAINED = Path(__file__).parents[2] / "examples" / "shapes" / "pretrained"
NUM_CLIPS, NUM_STEPS = 16, 40


def test_extrapolated_velocities_are_more_precise_than_a_first_block_cache() -> None:
    pipeline = WanPipeline.from_pretrained(PRETRAINED)
    transformer: Any = pipeline.transformer.eval()
    captions = [str(caption) for caption in split_captions("held_out")[:NUM_CLIPS]]
    prompts, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)
    noise = torch.randn(NUM_CLIPS, transformer.config.in_channels, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    calls: list[int] = []
    transformer.blocks[-2].attn1.register_forward_hook(lambda *_: calls.append(1))

    def last_state(interval: int = 1) -> tuple[torch.Tensor, int]:
        """Latents that the last gradient step may start from, and how many forwards led to them and from them."""
        calls.clear()
        *_, (_, latents, _) = record_states(
            transformer, load_scheduler(str(PRETRAINED)), noise=noise, step_indices=[NUM_STEPS - 2],
            num_inference_steps=NUM_STEPS, conditioning=Conditioning(prompts), cache_interval=interval,
        )  # fmt: skip
        return latents, len(calls)

    plain, number = last_state()
    assert number == 39

    def error(latents: torch.Tensor) -> float:
        """Mean over the clips of the relative error."""
        return float(((latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean())

    extrapolated = {number: error(latents) for latents, number in map(last_state, (2, 3, 4))}
    assert extrapolated == pytest.approx({21: 0.0066, 15: 0.0151, 12: 0.0338}, rel=0.2)
    for threshold, fewest, most, expected in ((0.05, 18, 20, 0.049), (0.1, 10, 12, 0.106)):
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        with transformer.cache_context("cond"):
            latents, number = last_state()
        transformer.disable_cache()
        assert fewest <= number <= most
        assert error(latents) == pytest.approx(expected, rel=0.3)
