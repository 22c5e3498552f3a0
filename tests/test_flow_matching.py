import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from hy_prfl.configs.base import TrainingConfig
from hy_prfl.flow_matching import (
    LogitNormalLevels,
    NoiseLevels,
    UniformLevels,
    add_noise,
    make_generator,
    noise_levels,
    row_noise,
    sample_noise,
    shift_sigmas,
    sigmas_to_timesteps,
    velocity_target,
)


def test_generators_depend_on_the_whole_key() -> None:
    draws = {
        key: torch.rand(1, generator=make_generator(*key)).item() for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1)]
    }
    assert len(set(draws.values())) == 4
    assert draws[0, 1, 2] == torch.rand(1, generator=make_generator(0, 1, 2)).item()


def test_row_noise_is_normal_and_belongs_to_the_row() -> None:
    noise = row_noise("clip-1", (16, 4, 20, 20), seed=3)
    assert torch.equal(noise, row_noise("clip-1", (16, 4, 20, 20), seed=3))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    for other in (
        row_noise("clip-2", (16,), seed=3),
        row_noise("clip-1", (16,), seed=4),
        row_noise("clip-1", (16,), seed=3, draw=1),
    ):
        assert not torch.equal(other, row_noise("clip-1", (16,), seed=3))


def test_each_sample_has_its_own_generator() -> None:
    noise = sample_noise((2, 3), [make_generator(5), make_generator(6)])
    assert torch.equal(noise[1], torch.randn((2, 3), generator=make_generator(6)))
    sigmas = [UniformLevels(1.0).sample([make_generator(key)]).item() for key in (5, 6)]
    assert UniformLevels(1.0).sample([make_generator(5), make_generator(6)]).tolist() == sigmas


def test_noise_path_and_its_velocity() -> None:
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[1], noise[1])
    sigmas = torch.tensor([0.3, 0.8], requires_grad=True)
    velocity = torch.autograd.functional.jvp(lambda sigma: add_noise(latents, noise, sigma), sigmas, torch.ones(2))[1]
    torch.testing.assert_close(velocity, velocity_target(latents, noise))


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0])
def test_uniform_distribution_is_the_shifted_schedule_of_1000_levels(flow_shift: float) -> None:
    sigmas = UniformLevels(flow_shift).sample([make_generator(0)] * 50_000)
    schedule = torch.tensor([flow_shift * u / (1 + (flow_shift - 1) * u) for u in (1 - i / 1000 for i in range(1000))])
    levels = schedule.sort().values
    nearest = torch.searchsorted(levels, sigmas - 1e-6).clamp(max=999)
    torch.testing.assert_close(levels[nearest], sigmas, rtol=0, atol=1e-6)
    for bound in (0.2, 0.5, 0.8):
        assert (sigmas <= bound).float().mean().item() == pytest.approx(
            (schedule <= bound).float().mean().item(), abs=8e-3
        )


def test_shift_5_has_the_mass_that_upstream_trains_on() -> None:
    sigmas = UniformLevels(5.0).sample([make_generator(1)] * 50_000)
    assert (sigmas > 0.8).float().mean().item() == pytest.approx(0.556, abs=0.01)
    assert (sigmas < 0.2).float().mean().item() == pytest.approx(0.048, abs=0.005)


def test_logit_normal_distribution() -> None:
    sigmas = LogitNormalLevels(1.0, mean=0.5, std=0.7).sample([make_generator(2)] * 50_000)
    logits = torch.logit(sigmas)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.015)
    assert logits.std().item() == pytest.approx(0.7, abs=0.015)


@pytest.mark.parametrize("levels", [UniformLevels(5.0), LogitNormalLevels(5.0, mean=0.0, std=8.0)])
def test_sigmas_stay_in_range(levels: NoiseLevels) -> None:
    sigmas = levels.sample([make_generator(3)] * 20_000)
    assert 0 < sigmas.min()
    assert sigmas.max() <= 1


def test_options_of_a_run_name_the_distribution() -> None:
    required = {"output_dir": "-", "pretrained_model_name_or_path": "-", "train_dataset": "-"}
    assert noise_levels(TrainingConfig(**required, flow_shift=3.0)) == UniformLevels(3.0)
    options = {"weighting_scheme": "logit_normal", "flow_shift": 2.0, "logit_mean": 0.4, "logit_std": 1.3}
    assert noise_levels(TrainingConfig(**required, **options)) == LogitNormalLevels(2.0, mean=0.4, std=1.3)


def test_time_runs_from_0_to_1000() -> None:
    assert sigmas_to_timesteps(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 250.0, 1000.0]
    assert shift_sigmas(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
@pytest.mark.parametrize("distribution", [UniformLevels, partial(LogitNormalLevels, mean=0.4, std=1.3)])
def test_conditional_noise_levels(distribution: Callable[[float], NoiseLevels], flow_shift: float) -> None:
    """Against draws from the whole distribution, without those outside the range."""
    given = distribution(flow_shift)
    every = given.sample([make_generator(0, index) for index in range(20_000)])
    share = given.probability_from(875.0)
    assert share == pytest.approx((1000 * every >= 875).double().mean().item(), abs=0.015)
    for timestep_range in ((875.0, math.inf), (-math.inf, 875.0)):
        low, high = timestep_range
        expected = every[(1000 * every >= low) & (1000 * every < high)]
        generators = [make_generator(1, index) for index in range(4000)]
        drawn = given.sample(generators, timestep_range)
        assert ((1000 * drawn >= low) & (1000 * drawn < high)).all()
        levels = torch.linspace(0.05, 0.95, 19)
        found = (drawn[:, None] <= expected.quantile(levels)).double().mean(dim=0)
        assert (found - levels).abs().max() < 0.04
    assert given.probability_from(0.0) == 1.0


def test_a_range_of_all_timesteps_changes_no_draw() -> None:
    generators = [[make_generator(index) for index in range(8)] for _ in range(2)]
    levels = UniformLevels(5.0)
    assert torch.equal(levels.sample(generators[0]), levels.sample(generators[1], (0.0, 1001.0)))
