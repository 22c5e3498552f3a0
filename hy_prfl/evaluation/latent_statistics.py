"""Statistics of clean latents that need no labels: how they move, how their channels are spread, their power spectrum."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch


# Statistics of one clip by name, each a list of one value, or of one for each channel.
Statistics = Mapping[str, Sequence[float]]

# Upper edges of the bands, in cycles per latent pixel and per latent frame.
SPATIAL_BANDS = {"low": 1 / 6, "middle": 1 / 3, "high": math.inf}
TEMPORAL_BANDS = {"slow": 1 / 4, "fast": math.inf}
# Frequencies on an edge belong to the band below it.
TOLERANCE = 1e-6
# Smaller ratios count as this one: a frozen video has no motion, and its logarithm would be infinite.
SMALLEST_RATIO = 1e-3

CHANNEL_MEANS, CHANNEL_VARIANCES, TEMPORAL_ENERGY = "channel_means", "channel_variances", "temporal_energy"


@torch.no_grad()
def measure_latents(latents: torch.Tensor) -> list[dict[str, list[float]]]:
    """
    Statistics of each clip of a batch.

    | name | value |
    |---|---|
    | `channel_means`, `channel_variances` | of each channel, over frames and pixels |
    | `temporal_energy` | mean squared difference of a frame and the next one |
    | `spatial_low`, `spatial_middle`, `spatial_high` | power of a frame about its mean, by spatial frequency |
    | `temporal_slow`, `temporal_fast` | power of a pixel about its mean over time, by temporal frequency |

    Powers are means over the channels, and those of all bands add up to the mean variance in space or in time
    (Parseval). Undefined statistics are left out: motion of a single frame, and bands without a frequency.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`):
            Clean normalised latents.
    """
    latents = latents.float()
    values = {
        CHANNEL_MEANS: latents.mean(dim=(2, 3, 4)),
        CHANNEL_VARIANCES: latents.var(dim=(2, 3, 4), correction=0),
    }
    if latents.shape[2] > 1:
        values[TEMPORAL_ENERGY] = (latents[:, :, 1:] - latents[:, :, :-1]).square().mean(dim=(1, 2, 3, 4))
    num_frames, height, width = latents.shape[2:]
    device = latents.device
    rows, columns = torch.fft.fftfreq(height, device=device), torch.fft.fftfreq(width, device=device)
    spatial = torch.fft.fft2(latents, norm="forward").abs().square().mean(dim=(1, 2))
    values |= _by_band("spatial", spatial, (rows[:, None] ** 2 + columns**2).sqrt(), SPATIAL_BANDS)
    temporal = torch.fft.fft(latents, dim=2, norm="forward").abs().square().mean(dim=(1, 3, 4))
    values |= _by_band("temporal", temporal, torch.fft.fftfreq(num_frames, device=device).abs(), TEMPORAL_BANDS)
    return [
        {name: value[index].reshape(-1).tolist() for name, value in values.items()} for index in range(len(latents))
    ]


def _by_band(
    kind: str, power: torch.Tensor, frequencies: torch.Tensor, bands: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Power `(batch_size,)` of each band that has a frequency; the constant part is in none."""
    values, lower = {}, 0.0
    for name, upper in bands.items():
        inside = (frequencies > lower + TOLERANCE) & (frequencies <= upper + TOLERANCE)
        if inside.any():
            values[f"{kind}_{name}"] = power[:, inside].sum(dim=1)
        lower = upper
    return values


def mean_statistics(clips: Iterable[Statistics]) -> dict[str, list[float]]:
    """Mean of each statistic over the clips that have it."""
    found: dict[str, list[Sequence[float]]] = {}
    for clip in clips:
        for name, values in clip.items():
            found.setdefault(name, []).append(values)
    return {
        name: [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for name, rows in found.items()
    }


def compare_statistics(samples: Statistics, real: Statistics) -> dict[str, float]:
    """
    How far samples are from real clips.

    | name | value | equal |
    |---|---|---|
    | `latents_temporal_energy`, `latents_spatial_<band>`, `latents_temporal_<band>` | ratio, samples to real | 1 |
    | `latents_channel_means` | root mean square over the channels of the difference, in standard deviations of the real | 0 |
    | `latents_channel_stds` | the same of the logarithm of the ratio of the standard deviations | 0 |
    | `latents_distance` | root mean square of the two and of the logarithms of all ratios | 0 |

    Args:
        samples, real (`Mapping`):
            Results of [`mean_statistics`]. Statistics that only one of them has are left out.

    Raises:
        ValueError: If the real clips have other channels than the samples, or a channel that is constant.
    """
    if len(samples[CHANNEL_MEANS]) != len(real[CHANNEL_MEANS]) or min(real[CHANNEL_VARIANCES]) <= 0:
        raise ValueError(
            f"`samples` and `real` must have as many channels, got {len(samples[CHANNEL_MEANS])} and "
            f"{len(real[CHANNEL_MEANS])}, and none of `real` may be constant."
        )
    ratios = {
        name: samples[name][0] / real[name][0]
        for name in real
        if name in samples and name not in (CHANNEL_MEANS, CHANNEL_VARIANCES) and real[name][0] > 0
    }
    variances = list(zip(samples[CHANNEL_VARIANCES], real[CHANNEL_VARIANCES], strict=True))
    means = zip(samples[CHANNEL_MEANS], real[CHANNEL_MEANS], strict=True)
    shifts = [
        (mine - theirs) / math.sqrt(theirs_2) for (mine, theirs), (_, theirs_2) in zip(means, variances, strict=True)
    ]
    distances = {
        "channel_means": _root_mean_square(shifts),
        "channel_stds": _root_mean_square([_log_ratio(mine / theirs) / 2 for mine, theirs in variances]),
    }
    total = _root_mean_square([*map(_log_ratio, ratios.values()), *distances.values()])
    return {f"latents_{name}": value for name, value in {**ratios, **distances, "distance": total}.items()}


def _log_ratio(ratio: float) -> float:
    return math.log(max(ratio, SMALLEST_RATIO))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
