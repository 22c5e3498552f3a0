import itertools

import numpy as np
import pytest
from scipy.stats import spearmanr

from hy_prfl.configs.keep import (
    Decision,
    check_keep,
    format_keep,
    num_forwards,
    num_scores,
    parse_keep,
)
from hy_prfl.inference.calibration import cheapest, cheapest_schedules, choose, rank_correlations


def make_scores(num_prompts: int = 40, num_candidates: int = 8, num_steps: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """A reward that knows more with every step: at first nothing, at the last step all."""
    rng = np.random.default_rng(0)
    final = rng.normal(size=(num_prompts, num_candidates))
    known = np.linspace(0, 1, num_steps)
    noise = rng.normal(size=(num_prompts, num_candidates, num_steps))
    return known * final[:, :, None] + np.sqrt(1 - known**2) * noise, final


class TestKeep:
    def test_parse(self) -> None:
        keep = parse_keep("6:4, 12:2,20:1")
        assert keep == (Decision(6, 4), Decision(12, 2), Decision(20, 1))
        assert format_keep(keep) == "6:4,12:2,20:1"
        assert parse_keep(None) == ()

    @pytest.mark.parametrize(
        "text", ["", "6", "6:0", "0:3", "6:4,", "6:4;12:2", "12:4,6:2", "6:4,6:2", "-1:3", "1.5:2"]
    )
    def test_bad_text(self, text: str) -> None:
        with pytest.raises(ValueError, match="`keep` must be a list"):
            parse_keep(text)

    def test_counts(self) -> None:
        """Of the example: 8 candidates for 6 steps, 4 for 6, 2 for 8, 1 for the last 30."""
        keep = parse_keep("6:4,12:2,20:1")
        assert num_forwards(keep, num_candidates=8, num_inference_steps=50) == 48 + 24 + 16 + 30
        assert num_scores(keep, num_candidates=8, num_final_timesteps=3) == 8 + 4 + 2
        assert num_forwards((), num_candidates=8, num_inference_steps=50) == 400
        assert num_scores((), num_candidates=8, num_final_timesteps=3) == 24
        assert num_scores((), num_candidates=1, num_final_timesteps=3) == 0
        keep = parse_keep("6:2")
        assert num_forwards(keep, num_candidates=4, num_inference_steps=50, resample=True) == 200

    def test_resampling_may_keep_as_many_as_before(self) -> None:
        keep = parse_keep("2:2,4:2")
        check_keep(keep, num_candidates=4, num_inference_steps=6, resample=True)
        with pytest.raises(ValueError, match="fewer than the 2 candidates"):
            check_keep(keep, num_candidates=4, num_inference_steps=6)


def test_rank_correlations() -> None:
    logits, final = make_scores()
    expected = [
        np.mean([spearmanr(logits[prompt, :, step], final[prompt]).statistic for prompt in range(len(final))])
        for step in range(logits.shape[2])
    ]
    np.testing.assert_allclose(rank_correlations(logits, final), expected, atol=1e-12)
    assert rank_correlations(logits, final)[-1] == pytest.approx(1.0)
    assert not rank_correlations(np.zeros_like(logits), final).any()


def test_choose_by_hand() -> None:
    logits, final = make_scores()
    keep = parse_keep("3:4,6:2")
    for prompt, chosen in enumerate(choose(logits, final, keep)):
        alive = sorted(range(8), key=lambda each: -logits[prompt, each, 2])[:4]
        alive = sorted(alive, key=lambda each: -logits[prompt, each, 5])[:2]
        assert chosen == max(alive, key=lambda each: final[prompt, each])
    assert (choose(logits, final, ()) == final.argmax(1)).all()


def test_cheapest_schedules() -> None:
    logits, final = make_scores()
    options = {"num_inference_steps": 10, "reward_cost": 0.1, "num_final_timesteps": 3}
    front = cheapest_schedules(logits, final, **options)  # type: ignore[arg-type]
    assert [each.cost for each in front] == sorted(each.cost for each in front)
    assert [each.gain for each in front] == sorted(each.gain for each in front)
    assert front[-1].share == 1.0
    # The last step's reward is the final one here, so that one decision there is as good as best-of-N, and cheaper.
    assert front[-1].cost <= (8 * 9 + 1 + 0.1 * 8) / 10
    best = cheapest(front, 0.9)
    assert 0.9 <= best.share
    assert best.cost < 6
    rows = np.arange(len(final))
    assert best.gain == pytest.approx(final[rows, choose(logits, final, best.keep)].mean() - final.mean())
    # No schedule of one decision is cheaper and as good.
    for step, count in itertools.product(range(1, 10), (1, 2, 3, 4, 6)):
        keep = (Decision(step, count),)
        gain = final[rows, choose(logits, final, keep)].mean() - final.mean()
        left = count * (10 - step) + 0.1 * (8 + (3 * count if count > 1 else 0))
        cost = (8 * step + left) / 10
        assert cost >= best.cost or gain < 0.9 * front[-1].gain


def test_one_candidate() -> None:
    logits, final = make_scores(num_candidates=1)
    with pytest.raises(ValueError, match="`num_candidates` must be at least 2"):
        cheapest_schedules(logits, final, num_inference_steps=10, reward_cost=0.1, num_final_timesteps=3)
