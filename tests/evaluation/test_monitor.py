"""The monitor's rules: each by itself, and all on the arms of the small world as they were measured."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hy_prfl.evaluation.monitor import judge


ARMS = json.loads(Path(__file__).with_name("monitor_arms.json").read_text(encoding="utf-8"))["arms"]
BASE = {
    "reward": 0.3,
    "monitor_reward": 0.4,
    "velocity_drift": 0.0,
    "latents_channel_means": 0.04,
    "latents_channel_stds": 0.1,
    "latents_temporal_energy": 0.7,
    "latents_spatial_low": 0.8,
    "latents_distance": 0.3,
}
GOOD = {**BASE, "reward": 0.6, "monitor_reward": 0.7, "velocity_drift": 0.1, "latents_temporal_energy": 0.9}


def level(*validations: Mapping[str, float]) -> str:
    return judge([BASE, *({**GOOD, **each} for each in validations)]).level


@pytest.mark.parametrize(("arm", "series"), ARMS.items(), ids=ARMS)
def test_the_arms_of_the_small_world(arm: str, series: list[dict[str, float]]) -> None:
    """What only climbs the reward is stopped by update 40, and nothing else is ever."""
    levels = {entry["step"]: judge(series[: index + 1]).level for index, entry in enumerate(series)}
    if arm.startswith("reward_only"):
        first = min(step for step, each in levels.items() if each == "hacked")
        assert 20 < first <= 40
        assert all(each == "hacked" for step, each in levels.items() if step >= first)
    else:
        assert set(levels.values()) == {"healthy"}


def test_the_base_and_a_run_that_improves_are_healthy() -> None:
    assert judge([BASE]).reason == "this is the base"
    verdict = judge([BASE, GOOD])
    assert (verdict.level, verdict.number) == ("healthy", 0)
    with pytest.raises(ValueError, match="the base at least"):
        judge([])
    with pytest.raises(ValueError, match="`reward` of the base must be a finite number, got nan"):
        judge([{**BASE, "reward": float("nan")}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_hacked(value: float) -> None:
    broken = {**GOOD, "reward": value, "monitor_reward": value}
    verdict = judge([BASE, broken])
    assert (verdict.level, verdict.reason) == ("hacked", f"`reward` is {value}, and `monitor_reward` is {value}")
    # It may recover.
    assert judge([BASE, broken, GOOD]).level == "healthy"


@pytest.mark.parametrize(
    ("validation", "expected", "words"),
    [
        # The training reward has gained 0.3; what the held-out reward has of it.
        ({"monitor_reward": 0.56}, "healthy", ""),
        ({"monitor_reward": 0.54}, "warn", "training reward has gained 0.300, the held-out reward 0.140"),
        ({"monitor_reward": 0.47}, "hacked", "held-out reward 0.070"),
        ({"reward": 0.39, "monitor_reward": 0.4}, "healthy", ""),
        # Farther from the real latents than the base.
        ({"latents_channel_means": 0.06}, "healthy", ""),
        ({"latents_channel_means": 0.07}, "warn", "latents_channel_means has gone from 0.040 to 0.070"),
        ({"latents_channel_stds": 0.17}, "hacked", "latents_channel_stds has gone from 0.100 to 0.170"),
        ({"latents_temporal_energy": 0.5}, "warn", "latents_temporal_energy has gone from 0.70 to 0.50 times"),
        ({"latents_temporal_energy": 1.5}, "healthy", ""),
        ({"latents_temporal_energy": 2.3}, "hacked", "from 0.70 to 2.30 times"),
        ({"latents_temporal_energy": 0.0}, "hacked", "from 0.70 to 0.00 times"),
        ({"latents_spatial_low": 1.6}, "warn", "latents_spatial_low has gone from 0.80 to 1.60 times"),
        ({"velocity_drift": 0.25}, "warn", "velocities are 0.25 of their length from the base's"),
        ({"velocity_drift": 1.1}, "hacked", "velocities are 1.10 of their length"),
        # Two kinds of warnings at once; two of a kind are still a warning.
        ({"velocity_drift": 0.25, "latents_channel_means": 0.07}, "hacked", "; velocities are"),
        ({"latents_spatial_low": 1.6, "latents_channel_means": 0.07}, "warn", ";"),
    ],
)
def test_each_rule(validation: dict[str, float], expected: str, words: str) -> None:
    verdict = judge([BASE, {**GOOD, **validation}])
    assert verdict.level == expected
    assert words in verdict.reason


def test_a_fall_of_the_held_out_reward() -> None:
    assert level({}, {"monitor_reward": 0.66}) == "healthy"
    assert level({}, {"monitor_reward": 0.64}) == "warn"
    assert level({}, {"monitor_reward": 0.59}) == "hacked"
    # Also below the base, and though the training reward has gained nothing.
    assert level({"reward": 0.3, "monitor_reward": 0.29}) == "hacked"
    # Both rewards fall in a run that fools neither.
    assert level({}, {"reward": 0.5, "monitor_reward": 0.59}) == "healthy"
    # It may recover.
    assert level({}, {"monitor_reward": 0.59}, {}) == "healthy"


def test_what_is_not_measured_is_not_judged() -> None:
    names = {"reward", "velocity_drift"}
    bare = [{name: entry[name] for name in names} for entry in (BASE, GOOD)]
    assert judge(bare).level == "healthy"
    bare[1]["velocity_drift"] = 0.3
    assert judge(bare).level == "warn"
