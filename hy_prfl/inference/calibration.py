"""How early a reward model can rank candidates, and the cheapest schedule of drops. Needs numpy only, no models."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from ..configs.base import check
from ..configs.keep import Decision, num_forwards, num_scores


# Most steps at which decisions are tried, and most decisions of a schedule.
MAX_STEPS, MAX_DECISIONS = 12, 3


@dataclass(frozen=True)
class Schedule:
    """
    A schedule of drops, measured on chains that were walked to the end.

    Args:
        keep (`tuple[Decision, ...]`):
            The decisions; without any it is best-of-N.
        cost (`float`):
            Forwards for a video, with those of the reward model at their relative cost, divided by those of a plain
            sample.
        gain (`float`):
            By how much the final logit of the chosen candidate exceeds the mean of all candidates.
        share (`float`):
            That gain divided by best-of-N's.
    """

    keep: tuple[Decision, ...]
    cost: float
    gain: float
    share: float


def rank_correlations(logits: np.ndarray, final: np.ndarray) -> np.ndarray:
    """
    Spearman's rank correlation of each step's reward with the final reward, over the candidates of a prompt.

    Args:
        logits (`np.ndarray` of shape `(num_prompts, num_candidates, num_steps)`):
            Logits of the noisy latents after each step.
        final (`np.ndarray` of shape `(num_prompts, num_candidates)`):
            Logits of the finished latents.

    Returns:
        `np.ndarray` of shape `(num_steps,)`: means over the prompts, in [-1, 1]; 0 where all candidates are equal.
    """
    ranks = rankdata(logits, axis=1) - (logits.shape[1] + 1) / 2
    wanted = (rankdata(final, axis=1) - (final.shape[1] + 1) / 2)[:, :, None]
    norms = np.sqrt((ranks**2).sum(1) * (wanted**2).sum(1))
    products = (ranks * wanted).sum(1)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0).mean(0)


def choose(logits: np.ndarray, final: np.ndarray, keep: Sequence[Decision]) -> np.ndarray:
    """
    The candidate of each prompt that a schedule chooses.

    Args:
        logits, final:
            As in [`rank_correlations`]; step `k` is in column `k - 1`.

    Returns:
        `np.ndarray` of shape `(num_prompts,)`: numbers of candidates.
    """
    alive = np.broadcast_to(np.arange(final.shape[1]), final.shape)
    for decision in keep:
        scores = np.take_along_axis(logits[:, :, decision.step - 1], alive, axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : decision.num_kept]
        alive = np.take_along_axis(alive, best, axis=1)
    scores = np.take_along_axis(final, alive, axis=1)
    return np.take_along_axis(alive, scores.argmax(axis=1)[:, None], axis=1)[:, 0]


def cheapest_schedules(
    logits: np.ndarray, final: np.ndarray, *, num_inference_steps: int, reward_cost: float, num_final_timesteps: int
) -> list[Schedule]:
    """
    The Pareto front of schedules by cost and gain, from the cheapest to best-of-N.

    It tries up to three decisions at up to twelve steps, spread over the chain, that keep 1, 2, 3, 4, 6, 8, 12, ...
    candidates.

    Args:
        logits, final:
            As in [`rank_correlations`].
        num_inference_steps (`int`):
            Steps of the chain, one more than `logits` has.
        reward_cost (`float`):
            Cost of a forward of the reward model, in steps of the generator.
        num_final_timesteps (`int`):
            Noise levels that finished candidates are scored at.

    Raises:
        ValueError: If there are fewer than two candidates or steps, or the number of steps does not fit.
    """
    num_candidates, num_steps = logits.shape[1:]
    check(num_candidates >= 2, "num_candidates", num_candidates, "at least 2")
    check(num_steps == num_inference_steps - 1 >= 1, "num_inference_steps", num_inference_steps, f"{num_steps + 1}")
    baseline = float(final.mean())
    rows = np.arange(len(final))

    def measure(keep: tuple[Decision, ...], best: float) -> Schedule:
        gain = float(final[rows, choose(logits, final, keep)].mean()) - baseline
        forwards = num_forwards(keep, num_candidates=num_candidates, num_inference_steps=num_inference_steps)
        scores = num_scores(keep, num_candidates=num_candidates, num_final_timesteps=num_final_timesteps)
        cost = (forwards + reward_cost * scores) / num_inference_steps
        return Schedule(keep, cost, gain, gain / best if best > 0 else 1.0)

    best_of_all = measure((), best=0.0)
    schedules = [measure((), best_of_all.gain)]
    steps = sorted({round(step) for step in np.linspace(1, num_steps, min(MAX_STEPS, num_steps))})
    counts = sorted({count for count in _counts(num_candidates) if count < num_candidates}, reverse=True)
    for number in range(1, MAX_DECISIONS + 1):
        for chosen in itertools.combinations(steps, number):
            for kept in itertools.combinations(counts, number):
                keep = tuple(Decision(step, count) for step, count in zip(chosen, kept, strict=True))
                schedules.append(measure(keep, best_of_all.gain))
    front: list[Schedule] = []
    for schedule in sorted(schedules, key=lambda each: (each.cost, -each.gain)):
        if not front or schedule.gain > front[-1].gain:
            front.append(schedule)
    return front


def _counts(number: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to a number."""
    counts = [1]
    while counts[-1] < number:
        power = 1 << (counts[-1].bit_length() - 1)
        counts.append(counts[-1] + max(1, power // 2))
    return counts


def cheapest(front: Sequence[Schedule], share: float) -> Schedule:
    """The cheapest schedule that keeps this share of best-of-N's gain; best-of-N itself if there is no other."""
    return next((schedule for schedule in front if schedule.share >= share), front[-1])
