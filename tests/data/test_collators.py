import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hy_prfl.data.collators import LatentBatch, PreferenceBatch, collate_labeled, collate_latents, collate_preferences
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.data.schema import pack_tensor, table_to_rows


@pytest.fixture
def rows(tmp_path: Path, write_latents: Callable[..., Path]) -> list[dict[str, Any]]:
    return table_to_rows(load_latent_dataset(str(write_latents(tmp_path / "d", 4, image_to_video=True)))[:])


def test_prompts_are_padded_with_zeros(rows: list[dict[str, Any]]) -> None:
    batch = collate_latents(rows)
    assert batch.prompt_embeds.shape == (4, 16, 32)
    for index, row in enumerate(rows):
        length = row["prompt_embeds_shape"][0]
        np.testing.assert_array_equal(batch.prompt_embeds[index, :length].flatten(), np.float32(row["prompt_embeds"]))
        assert not batch.prompt_embeds[index, length:].any()
    assert torch.equal(batch.null_prompt_embeds[:, 0], torch.full((4, 32), 0.5))
    assert not batch.null_prompt_embeds[:, 1:].any()
    assert batch.condition is not None
    assert batch.condition.shape == (4, 20, 2, 4, 4)
    assert batch.image_embeds is not None
    assert batch.image_embeds.shape == (4, 5, 32)


def test_long_caption_falls_back_to_the_caption(rows: list[dict[str, Any]]) -> None:
    rows[1] |= pack_tensor("long_prompt_embeds", np.full((2, 32), 3.0), "float16", source="x")
    batch = collate_latents(rows)
    assert torch.equal(batch.long_prompt_embeds[0], batch.prompt_embeds[0])
    assert torch.equal(batch.long_prompt_embeds[1, :2], torch.full((2, 32), 3.0))


def test_labels_and_pairs(rows: list[dict[str, Any]]) -> None:
    assert collate_labeled(rows, "motion_quality").labels.tolist() == [0, 1, 0, 1]
    pairs = collate_preferences([(rows[1], rows[0]), (rows[3], rows[2])])
    assert (pairs.chosen.ids, pairs.rejected.ids) == (["clip-1", "clip-3"], ["clip-0", "clip-2"])
    assert pairs.ids == ["clip-1", "clip-3", "clip-0", "clip-2"]
    both = LatentBatch.concatenate([pairs.chosen, pairs.rejected])
    assert torch.equal(both.latents, collate_latents([rows[i] for i in (1, 3, 0, 2)]).latents)  # type: ignore[arg-type]


def test_to_moves_nested_tensors(rows: list[dict[str, Any]]) -> None:
    moved = collate_labeled(rows, "motion_quality").to(torch.device("meta"))
    assert moved.labels.is_meta
    assert moved.clips.latents is not None
    assert moved.clips.latents.is_meta
    assert moved.clips.ids == ["clip-0", "clip-1", "clip-2", "clip-3"]


def test_batches_keep_the_stored_type_and_are_cast_on_the_device(rows: list[dict[str, Any]]) -> None:
    """Half of the bytes through shared memory; DeepSpeed casts no inputs in bfloat16."""
    stored = collate_labeled(rows, "motion_quality")
    tensors = ("latents", "condition", "image_embeds", "prompt_embeds", "long_prompt_embeds", "null_prompt_embeds")
    assert {getattr(stored.clips, name).dtype for name in tensors} == {torch.float16}
    # Of the three prompts the 4 tokens of the longest one, not the 16 that they are padded to.
    assert stored.nbytes == 4 * 4 + 2 * 4 * (16 * 2 * 4 * 4 + 20 * 2 * 4 * 4 + 5 * 32 + 3 * 4 * 32)
    cast = stored.to(torch.device("cpu"), torch.bfloat16)
    for name in tensors:
        value, expected = getattr(cast.clips, name), getattr(stored.clips, name)
        dtype = torch.bfloat16 if name.endswith("embeds") else torch.float32
        assert value.dtype == dtype, name
        assert torch.equal(value, expected.float().to(dtype)), name
    assert cast.labels.dtype == torch.float32


def test_padding_is_made_again_where_a_batch_arrives(rows: list[dict[str, Any]]) -> None:
    """Workers send, and devices get, the tokens of the longest prompt alone."""
    rows[2] |= pack_tensor("long_prompt_embeds", np.full((7, 32), 3.0), "float16", source="x")
    batch = collate_latents(rows)
    assert batch.num_tokens == 7
    sent = pickle.dumps(batch)
    assert len(sent) < 8000 + sum(getattr(batch, name).nbytes for name in ("latents", "condition", "image_embeds"))
    for copy in (pickle.loads(sent), batch.to(torch.device("cpu"), torch.float16)):
        assert copy.num_tokens == 7
        for name in ("prompt_embeds", "long_prompt_embeds", "null_prompt_embeds"):
            assert getattr(copy, name).shape == (4, 16, 32)
            assert torch.equal(getattr(copy, name), getattr(batch, name)), name
    one, two = collate_latents(rows[:2]), collate_latents(rows[2:])
    assert LatentBatch.concatenate([one, two]).num_tokens == 7
    loader = torch.utils.data.DataLoader(rows, batch_size=4, num_workers=1, collate_fn=collate_preference_of_itself)
    (pairs,) = list(loader)
    for name in ("prompt_embeds", "long_prompt_embeds", "null_prompt_embeds", "latents", "condition", "image_embeds"):
        assert torch.equal(getattr(pairs.rejected, name), getattr(batch, name)), name


def collate_preference_of_itself(rows: list[dict[str, Any]]) -> PreferenceBatch:
    return collate_preferences([(row, row) for row in rows])


def test_rows_that_do_not_stack_are_named(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="different shapes"):
        collate_latents([rows[0], rows[1] | {"latents_shape": [16, 2, 4, 6]}])
    with pytest.raises(ValueError, match=r"\['clip-1'\] have no `image_embeds`"):
        collate_latents([rows[0], rows[1] | {"image_embeds": None}])
    with pytest.raises(ValueError, match="'clip-1' lacks the embedding"):
        collate_latents([rows[0], rows[1] | {"null_prompt_embeds": None}])
    with pytest.raises(ValueError, match=r"'clip-1': 3 tokens, `max_sequence_length` 8"):
        collate_latents([rows[0], rows[1] | {"max_sequence_length": 8}])
