"""Chains are the pipeline's own, and what they lead to is read off them step by step."""

from diffusers import WanPipeline

from examples.shapes.clips import split_captions
from examples.shapes.experiments.decisions import FORESEEN, NUM_STEPS, follow_chains
from hy_prfl.models.reward_model import WanRewardModel


def test_a_video_is_foreseen_long_before_it_is_there(shipped: WanPipeline) -> None:
    model = WanRewardModel.from_transformer(shipped.transformer, num_layers=1).eval()
    captions = [str(caption) for caption in split_captions("train")][:48]
    points = follow_chains(shipped, {"finetuned": model}, captions, seed=0)
    assert len(points) == NUM_STEPS
    assert [index for index, point in enumerate(points) if "foreseen/frozen" in point] == list(FORESEEN)
    assert points[0]["timestep"] > points[-1]["timestep"]
    for failure in ("frozen", "vanishing"):
        # From noise alone nothing is certain; after most of the steps the foreseen video is nearly the finished one.
        assert points[0][f"foreseen/{failure}"] < 0.9 < points[FORESEEN[-1]][f"foreseen/{failure}"]
        assert all(0 <= point[f"finetuned/{failure}"] <= 1 for point in points)
