"""Statistics of latents against plain numpy, and against signals whose spectrum is known."""

import numpy as np
import pytest
import torch

from hy_prfl.evaluation.latent_statistics import compare_statistics, mean_statistics, measure_latents


def moments(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return latents.mean(axis=(1, 2, 3)), latents.var(axis=(1, 2, 3))


def test_moments_and_motion_are_those_of_numpy() -> None:
    latents = np.random.default_rng(0).normal(size=(2, 16, 5, 6, 8))
    for clip, found in zip(latents, measure_latents(torch.from_numpy(latents)), strict=True):
        means, variances = moments(clip)
        np.testing.assert_allclose(found["channel_means"], means, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["channel_variances"], variances, rtol=1e-4)
        differences = [(clip[:, frame + 1] - clip[:, frame]) ** 2 for frame in range(4)]
        np.testing.assert_allclose(found["temporal_energy"], [np.mean(differences)], rtol=1e-4)


def test_powers_add_up_to_the_variance() -> None:
    latents = torch.randn(1, 3, 5, 7, 6, generator=torch.Generator().manual_seed(0)) + 4
    (found,) = measure_latents(latents)
    spatial = sum(found[f"spatial_{band}"][0] for band in ("low", "middle", "high"))
    assert spatial == pytest.approx(float(latents.var(dim=(3, 4), correction=0).mean()), rel=1e-4)
    temporal = sum(found[f"temporal_{band}"][0] for band in ("slow", "fast"))
    assert temporal == pytest.approx(float(latents.var(dim=2, correction=0).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("cycles", "band"), [(1, "low"), (2, "low"), (3, "middle"), (4, "middle"), (5, "high"), (6, "high")]
)
def test_a_wave_is_in_its_band(cycles: int, band: str) -> None:
    """Frequencies of 12 pixels: 2 / 12 and 4 / 12 are the edges."""
    wave = torch.cos(2 * torch.pi * cycles * torch.arange(12) / 12).expand(1, 1, 1, 12, 12)
    (found,) = measure_latents(wave)
    powers = {name: found[f"spatial_{name}"][0] for name in ("low", "middle", "high")}
    assert powers.pop(band) == pytest.approx(1.0 if cycles == 6 else 0.5, rel=1e-4)
    assert max(powers.values()) < 1e-6
    assert "temporal_energy" not in found
    assert not any(name.startswith("temporal") for name in found)


def test_a_flicker_is_fast_and_a_turn_is_slow() -> None:
    frames = torch.arange(8)
    for cycles, band, other in ((4, "fast", "slow"), (2, "slow", "fast")):
        wave = torch.cos(2 * torch.pi * cycles * frames / 8).view(1, 1, 8, 1, 1).expand(1, 1, 8, 4, 4)
        (found,) = measure_latents(wave)
        assert found[f"temporal_{band}"][0] > 0.4
        assert found[f"temporal_{other}"][0] < 1e-6


def test_comparison_is_plain_arithmetic() -> None:
    rng = np.random.default_rng(1)
    real, samples = rng.normal(size=(16, 4, 6, 6)), 0.5 + 2 * rng.normal(size=(16, 4, 6, 6))
    measured = [mean_statistics(measure_latents(torch.from_numpy(each)[None])) for each in (samples, real)]
    found = compare_statistics(*measured)
    (mine, mine_2), (theirs, theirs_2) = moments(samples), moments(real)
    assert found["latents_channel_means"] == pytest.approx(np.sqrt(np.mean((mine - theirs) ** 2 / theirs_2)), rel=1e-3)
    logs = np.log(np.sqrt(mine_2 / theirs_2))
    assert found["latents_channel_stds"] == pytest.approx(np.sqrt(np.mean(logs**2)), rel=1e-3)
    energy = [np.mean(np.diff(each, axis=1) ** 2) for each in (samples, real)]
    assert found["latents_temporal_energy"] == pytest.approx(energy[0] / energy[1], rel=1e-3)
    ratios = [value for name, value in found.items() if name.split("_")[1] in ("temporal", "spatial")]
    assert len(ratios) == 6
    parts = [*np.log(ratios), found["latents_channel_means"], found["latents_channel_stds"]]
    assert found["latents_distance"] == pytest.approx(np.sqrt(np.mean(np.square(parts))))
    same = compare_statistics(measured[1], measured[1])
    assert same["latents_distance"] == 0
    assert same["latents_temporal_energy"] == 1


def test_a_frozen_video_has_a_distance_that_is_finite() -> None:
    real = torch.randn(1, 4, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    frozen = real[:, :, :1].expand_as(real)
    found = compare_statistics(*(mean_statistics(measure_latents(each)) for each in (frozen, real)))
    assert found["latents_temporal_energy"] == 0
    assert 2 < found["latents_distance"] < 10


def test_means_are_over_the_clips_that_have_a_statistic() -> None:
    video, image = torch.ones(1, 2, 3, 4, 4), torch.full((1, 2, 1, 4, 4), 3.0)
    found = mean_statistics([*measure_latents(video), *measure_latents(image)])
    assert found["channel_means"] == [2.0, 2.0]
    assert found["temporal_energy"] == [0.0]
    with pytest.raises(ValueError, match="as many channels, got 2 and 2, and none of `real` may be constant"):
        compare_statistics(found, found)
