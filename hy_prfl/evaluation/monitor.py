"""Whether a PRFL run still improves videos or only its own reward: rules on the metrics of its validations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


Level = Literal["healthy", "warn", "hacked"]
LEVELS: tuple[Level, ...] = ("healthy", "warn", "hacked")

# Each limit is a pair: a rule finds `warn` from the first value on, and `hacked` from the second.
# Gain of the training reward from which on the gain of the held-out reward is compared with it.
MIN_GAIN = 0.1
# Share of that gain that the held-out reward lacks.
UNSHARED = (0.5, 0.75)
# Fall of the held-out reward from its best, while the training reward has not fallen since then.
FALL = (0.05, 0.1)
# Growth, since the base, of the channels' distance to real latents, in standard deviations.
SHIFT = (0.025, 0.045)
# Growth, since the base, of the distance of motion or power to real latents, as a difference of logarithms.
DEPARTURE = (0.2, 0.4)
# Relative distance of the velocities to the base's. It may grow in a long run, but not to their full length.
DRIFT = (0.15, 1.0)


@dataclass(frozen=True)
class Verdict:
    """
    The state of a run, judged by its validations.

    Args:
        level (`str`):
            `"healthy"`, `"warn"` or `"hacked"`.
        reason (`str`):
            The rules that led to it, with their numbers; part of a sentence.
    """

    level: Level
    reason: str

    @property
    def number(self) -> int:
        """0, 1 or 2, for plots."""
        return LEVELS.index(self.level)


@dataclass(frozen=True)
class Finding:
    """What one rule has found; kinds are `held-out`, `statistics` and `drift`."""

    kind: str
    level: Level
    text: str


def judge(series: Sequence[Mapping[str, float]]) -> Verdict:
    """
    The verdict on a run after its last validation.

    The worst finding counts. Warnings of two kinds at once are `hacked`: for example, a generator that has moved far while
    its latents have become less like real ones has not moved in a good direction. A metric that is not a finite number is
    `hacked` too: the samples have become useless.

    Args:
        series (`Sequence[Mapping[str, float]]`):
            Metrics of each validation, oldest first. The first one is of the base. Rules on missing metrics find
            nothing.

    Raises:
        ValueError: If there is no validation, or a metric of the base is not a finite number.
    """
    if not series:
        raise ValueError("`series` must have the metrics of the base at least.")
    for name, value in series[0].items():
        if not math.isfinite(value):
            raise ValueError(f"`series`: `{name}` of the base must be a finite number, got {value!r}.")
    if len(series) == 1:
        return Verdict("healthy", "this is the base")
    broken = [f"`{name}` is {value}" for name, value in series[-1].items() if not math.isfinite(value)]
    if broken:
        return Verdict("hacked", ", and ".join(broken[:2]))
    findings = [*_held_out(series), *_statistics(series[0], series[-1]), *_drift(series[-1])]
    if not findings:
        return Verdict("healthy", "no rule has found anything")
    worst = max((finding.level for finding in findings), key=LEVELS.index)
    if len({finding.kind for finding in findings}) > 1:
        worst = "hacked"
    return Verdict(worst, "; ".join(finding.text for finding in findings))


def _held_out(series: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """The held-out reward does not share the gain of the training reward, or falls."""
    base, now = series[0], series[-1]
    if "monitor_reward" not in now:
        return
    gain, shared = (now[name] - base[name] for name in ("reward", "monitor_reward"))
    if gain >= MIN_GAIN:
        level = _level(1 - shared / gain, UNSHARED)
        if level != "healthy":
            yield Finding(
                "held-out", level, f"the training reward has gained {gain:.3f}, the held-out reward {shared:.3f}"
            )
    best = max(series, key=lambda entry: entry["monitor_reward"])
    level = _level(best["monitor_reward"] - now["monitor_reward"], FALL)
    if level != "healthy" and now["reward"] >= best["reward"]:
        changes = [f"{best[name]:.3f} to {now[name]:.3f}" for name in ("monitor_reward", "reward")]
        text = f"the held-out reward has fallen from {changes[0]}, while the training reward went from {changes[1]}"
        yield Finding("held-out", level, text)


def _statistics(base: Mapping[str, float], now: Mapping[str, float]) -> Iterator[Finding]:
    """The latents become less like the real ones than the base's were."""
    for name, value in now.items():
        if name in ("latents_channel_means", "latents_channel_stds"):
            level, what = (
                _level(value - base[name], SHIFT),
                f"from {base[name]:.3f} to {value:.3f} standard deviations",
            )
        elif name.startswith(("latents_temporal_", "latents_spatial_")):
            level = _level(abs(_log(value)) - abs(_log(base[name])), DEPARTURE)
            what = f"from {base[name]:.2f} to {value:.2f} times those of real latents"
        else:
            continue
        if level != "healthy":
            yield Finding("statistics", level, f"{name} has gone {what}")


def _drift(now: Mapping[str, float]) -> Iterator[Finding]:
    """The generator is far from the base."""
    level = _level(now["velocity_drift"], DRIFT)
    if level != "healthy":
        yield Finding("drift", level, f"velocities are {now['velocity_drift']:.2f} of their length from the base's")


def _level(value: float, limits: tuple[float, float]) -> Level:
    return LEVELS[sum(value >= limit for limit in limits)]


def _log(ratio: float) -> float:
    return math.log(max(ratio, 1e-3))
