"""Chains are those that the search walks, so what a schedule would have chosen is what it chooses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from examples.shapes.clips import split_captions
from examples.shapes.experiments.candidates import score_chains
from examples.shapes.experiments.candidates_results import (
    cost,
    groups,
    run_schedule,
    summarize_chains,
    table,
    where_dropped,
    write_results,
)
from examples.shapes.experiments.runs import RESULTS_DIR
from examples.shapes.experiments.sampling import NUM_STEPS, walk_chains
from hy_prfl.configs.keep import Decision, parse_keep
from hy_prfl.inference.candidate_settings import CandidateSettings
from hy_prfl.inference.candidates import sample_candidates
from hy_prfl.models.reward_model import WanRewardModel


def test_the_search_chooses_what_the_chains_say(shipped: WanPipeline) -> None:
    torch.manual_seed(0)
    model = WanRewardModel.from_transformer(shipped.transformer, num_layers=1).eval()
    caption, seeds = str(split_captions("held_out")[0]), [5, 6, 7, 8]
    chains = walk_chains(shipped, [caption] * 4, seeds)
    text, latents = torch.from_numpy(chains["text"]), torch.from_numpy(chains["latents"])
    scores = score_chains(model, latents, text, shipped.scheduler.timesteps)
    keep = parse_keep("3:3,8:2")
    shipped.set_progress_bar_config(disable=True)
    settings = CandidateSettings(keep=keep, batch_size=4)
    inputs = {"prompt": caption, "height": 48, "width": 48, "num_frames": 17, "num_inference_steps": NUM_STEPS}
    result = sample_candidates(
        shipped, model, seeds, settings, output_type="latent", guidance_scale=1.0, max_sequence_length=16, **inputs
    )
    final = scores["clean"][:, 1:].mean(axis=1)
    dropped = where_dropped(scores["noisy"], final, keep)
    assert dropped == [each.dropped_after for each in result.candidates]
    winner = dropped.index(None)
    np.testing.assert_allclose(chains["latents"][winner, -1], result.frames, atol=1e-4)
    for number, each in enumerate(result.candidates):
        for step, logit in each.logits.items():
            assert logit == pytest.approx(scores["noisy"][number, step - 1], abs=1e-4)
    assert result.candidates[winner].final_logit == pytest.approx(final[winner], abs=1e-4)


def made_up_chains(seed: int, num_captions: int = 24, num_candidates: int = 8) -> dict[str, np.ndarray]:
    """A reward that knows the verdict better with every step."""
    rng = np.random.default_rng(seed)
    good = rng.random((num_captions, num_candidates)) < 0.33
    known = np.linspace(0, 3, NUM_STEPS - 1)
    noisy = known * good[:, :, None] + rng.normal(size=(*good.shape, NUM_STEPS - 1))
    clean = 3 * good[:, :, None] + rng.normal(size=(*good.shape, 4))
    frames = rng.integers(0, 256, size=(*good.shape, 5, 48, 48, 3), dtype=np.uint8)
    kind = np.where(good, "good", np.where(rng.random(good.shape) < 0.1, "beyond", "frozen"))
    return {"kind": kind, "frames": frames} | {
        f"demo/{what}": each for what, each in (("noisy", noisy), ("clean", clean))
    }


def test_results_of_made_up_chains(tmp_path: Path) -> None:
    chains = [made_up_chains(seed) for seed in (0, 1)]
    runs = [{"kind": each["kind"][:, 0], "counts": np.full((24, 3), [40, 9, 2])} for each in chains]
    found = summarize_chains(chains, {"guided": runs})
    assert found["plain"]["good"]["mean"] == pytest.approx(
        np.mean([each["kind"] == "good" for each in chains]), abs=1e-3
    )
    demo = found["models"]["demo"]
    assert demo["best_of"]["4"]["num_videos"] == 2 * 24 * 2
    assert demo["best_of"]["8"]["forwards"] == 8
    assert found["plain"]["good"]["mean"] < demo["best_of"]["2"]["good"]["mean"] < demo["best_of"]["8"]["good"]["mean"]
    assert demo["best_of"]["8"]["good"]["mean"] <= found["oracle"]["8"]["mean"]
    assert demo["pruned"]["3 x"]["forwards"] <= 3
    assert demo["auc"][0]["mean"] < 0.6 < 0.9 < demo["auc"][-1]["mean"]
    assert found["changed"]["guided"]["with_reward"] == pytest.approx((40 + 9 + 2 * 2) / NUM_STEPS)
    write_results(tmp_path, {"base": found}, [0, 1], chains[0], ["a caption"] * 24)
    page = (tmp_path / "candidates.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 6 * 8
    assert page.count(": chosen;") == 6
    assert (tmp_path / "candidates.png").stat().st_size > 1000


def test_groups_and_cost() -> None:
    values = np.arange(24).reshape(2, 12)
    assert groups(values, 4).tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        *(groups(values[1:], 4).tolist()),
    ]
    keep = (Decision(4, 1),)
    assert cost(keep, 8, "demo") == {"forwards": (32 + 16) / 20, "with_reward": (48 + 8) / 20}
    chains = made_up_chains(3)
    chosen = run_schedule(chains, "demo", 8, keep)
    assert (
        chosen
        == [row[each] for row, each in zip(chains["kind"], chains["demo/noisy"][:, :, 3].argmax(1), strict=True)]
    ).all()


def test_the_page_shows_the_results() -> None:
    results = json.loads((RESULTS_DIR / "candidates.json").read_text(encoding="utf-8"))
    page = (RESULTS_DIR.parents[3] / "docs" / "candidates.md").read_text(encoding="utf-8").splitlines()
    rows = table(results["generators"])
    assert len(rows) == 34
    assert [row for row in rows if row not in page] == []
