"""Distances to the base against the same arithmetic with plain calls of the transformer."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.evaluation.drift import BaseSamples
from hy_prfl.flow_matching import row_noise
from hy_prfl.models.conditioning import Conditioning


IDS, INDICES, SIGMAS = ["a", "b"], [4, 1], [0.25, 0.75]


@torch.no_grad()
def test_distances_are_those_of_plain_calls(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer").eval()
    generator = torch.Generator().manual_seed(0)
    samples, others = torch.randn(2, 2, 16, 2, 4, 4, generator=generator)
    prompts = torch.randn(2, 3, 32, generator=generator)
    conditioning = Conditioning(prompts)
    base = BaseSamples(SIGMAS, seed=5)
    base.add(transformer, INDICES, samples, conditioning, row_ids=IDS)
    same = base.distances(transformer, INDICES, samples, conditioning, row_ids=IDS)
    # Within the rounding of float16.
    assert max(max(pair) for pair in same) < 1e-3

    def velocity(row: int, level: int) -> torch.Tensor:
        noise = row_noise(IDS[row], (16, 2, 4, 4), seed=5, draw=level)
        state = (1 - SIGMAS[level]) * samples[row].half().float() + SIGMAS[level] * noise
        timestep = torch.tensor([1000 * SIGMAS[level]])
        return transformer(state[None], timestep, prompts[row : row + 1], return_dict=False)[0][0]

    before = [[velocity(row, level) for level in range(2)] for row in range(2)]
    for parameter in transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    # Rows are divided over processes otherwise when a run is resumed with another number of them.
    base.save(tmp_path / "monitor-0.safetensors")
    restored = BaseSamples(SIGMAS, seed=5)
    restored.load([tmp_path / "monitor-0.safetensors"])
    for kept in (base, restored):
        found = kept.distances(transformer, INDICES, others, conditioning, row_ids=IDS)
        for row, (sample_drift, velocity_drift) in enumerate(found):
            expected = (others[row] - samples[row]).norm() / samples[row].norm()
            assert sample_drift == pytest.approx(float(expected), rel=1e-3)
            changes = [(velocity(row, level) - old).norm() / old.norm() for level, old in enumerate(before[row])]
            assert velocity_drift == pytest.approx(float(sum(changes) / 2), rel=1e-3)
    assert found[0][1] > 1e-2
    with pytest.raises(KeyError):
        restored.distances(transformer, [0, 1], others, conditioning, row_ids=IDS)
