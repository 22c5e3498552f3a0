"""Rows of random latents are rows of a latent dataset like any other."""

from pathlib import Path

import torch

from hy_prfl.data.collators import collate_labeled
from hy_prfl.data.dataset import RowDataset, load_latent_dataset
from hy_prfl.data.synthetic import synthetic_dataset


def test_rows_are_read_back_with_their_shapes(tmp_path: Path) -> None:
    dataset = synthetic_dataset(
        latents_shape=(16, 3, 4, 6), text_dim=8, text_tokens=5, max_sequence_length=7, vae_fingerprint="vae",
        condition_shape=(20, 3, 4, 6), image_embeds_shape=(9, 10), num_rows=4,
    )  # fmt: skip
    dataset.save_to_disk(tmp_path / "data")
    rows = RowDataset(load_latent_dataset(str(tmp_path / "data")), range(4))
    batch = collate_labeled([rows[index] for index in range(4)], task="motion_quality").to(torch.device("cpu"))
    clips = batch.clips
    assert batch.labels.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert clips.latents is not None
    assert clips.latents.shape == (4, 16, 3, 4, 6)
    assert clips.prompt_embeds.shape == clips.null_prompt_embeds.shape == (4, 7, 8)
    assert not clips.prompt_embeds[:, 5:].any()
    assert clips.prompt_embeds[:, :5].ne(0).all()
    assert clips.condition is not None
    assert clips.condition.shape == (4, 20, 3, 4, 6)
    assert clips.image_embeds is not None
    assert clips.image_embeds.shape == (4, 9, 10)
    # Good rows differ from poor ones in their mean.
    means = clips.latents.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(means, torch.tensor([0.0, 1.0, 0.0, 1.0]), atol=0.15, rtol=0)


def test_same_seed_same_rows() -> None:
    first, again, other = (
        synthetic_dataset(latents_shape=(2, 1, 2, 2), text_dim=3, text_tokens=2, vae_fingerprint="v", seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.to_list() == again.to_list()
    assert first.to_list() != other.to_list()
    assert first["max_sequence_length"] == [2, 2]
