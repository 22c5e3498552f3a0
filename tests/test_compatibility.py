from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import WanTransformer3DModel

from hy_prfl.compatibility import check_fits_generator, check_rows_fit, check_same_vae
from hy_prfl.data.dataset import load_latent_dataset
from hy_prfl.models.reward_model import WanRewardModel


Write = Callable[..., Path]
TEXT_TO_VIDEO: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "text_dim": 32, "image_dim": None, "pos_embed_seq_len": None,
    "patch_size": (1, 2, 2),
}  # fmt: skip


def test_a_reward_model_fits_its_generator(pipeline_dir: Path, i2v_pipeline_dir: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    i2v_transformer = WanTransformer3DModel.from_pretrained(i2v_pipeline_dir, subfolder="transformer")
    model = WanRewardModel.from_transformer(transformer, num_layers=2, vae_fingerprint="abc")
    check_fits_generator(model.config, transformer.config)
    with pytest.raises(ValueError, match="`in_channels` 16 against 36, `image_dim` None against 32"):
        check_fits_generator(model.config, i2v_transformer.config)
    larger = dict(transformer.config) | {"num_layers": 40, "ffn_dim": 64}
    with pytest.raises(ValueError, match=r"`ffn_dim` 32 against 64, `base_num_layers` 3 against 40.*allow_other_base"):
        check_fits_generator(model.config, larger)
    check_fits_generator(model.config, larger, allow_other_base=True)


def test_latents_of_another_vae() -> None:
    check_same_vae("abc", "abc", source="d", of="the pipeline")
    check_same_vae(None, "abc", source="d", of="the pipeline")
    check_same_vae("abc", None, source="d", of="the pipeline")
    with pytest.raises(ValueError, match="d: of another VAE than the pipeline: `vae_fingerprint` xyz against abc"):
        check_same_vae("xyz", "abc", source="d", of="the pipeline")


def test_rows_that_do_not_fit_a_model_are_named(tmp_path: Path, write_latents: Write) -> None:
    dataset = load_latent_dataset(str(write_latents(tmp_path / "d", 2)))
    check_rows_fit(dataset, "d", TEXT_TO_VIDEO)
    for change, message in [
        ({"out_channels": 48, "in_channels": 48}, r"'clip-0', `latents_shape`: the model takes 48, got 16"),
        ({"text_dim": 64}, r"`prompt_embeds_shape`: the model takes 64, got 32"),
        ({"image_dim": 32}, r"`image_embeds_shape`: the model takes 32, got None"),
        ({"in_channels": 36}, r"`condition_shape`: the model takes 20, got 0"),
        ({"patch_size": (1, 3, 2)}, r"cannot be divided into patches"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_rows_fit(dataset, "d", TEXT_TO_VIDEO | change)


def test_the_number_of_images_has_to_be_the_models(tmp_path: Path, write_latents: Write) -> None:
    one = load_latent_dataset(str(write_latents(tmp_path / "one", 2, image_to_video=True)))
    shape = {"image_embeds_shape": [2, 5, 32]}
    two = load_latent_dataset(
        str(write_latents(tmp_path / "two", 2, image_to_video=True, overrides={0: shape, 1: shape}))
    )
    fits = TEXT_TO_VIDEO | {"in_channels": 36, "image_dim": 32}
    check_rows_fit(one, "d", fits)
    check_rows_fit(two, "d", fits | {"pos_embed_seq_len": 10})
    for dataset in (one, two):
        check_rows_fit(dataset, "d", TEXT_TO_VIDEO, ignores_images=True)
    for dataset, length, message in [
        (one, 10, "takes 2 images of 5 tokens, got 1 image"),
        (two, None, "takes 1 image, got 2 images of 5 tokens"),
        (two, 514, "takes 2 images of 257 tokens, got 2 images of 5 tokens"),
    ]:
        with pytest.raises(ValueError, match=f"'clip-0', `image_embeds_shape`: the model {message}"):
            check_rows_fit(dataset, "d", fits | {"pos_embed_seq_len": length})


def test_a_first_frame_is_for_pipelines_that_take_one(tmp_path: Path, write_latents: Write) -> None:
    frame = {"condition": np.zeros(16 * 16, dtype=np.float16), "condition_shape": [16, 1, 4, 4]}
    every = load_latent_dataset(str(write_latents(tmp_path / "every", 2, overrides={0: frame, 1: frame})))
    some = load_latent_dataset(str(write_latents(tmp_path / "some", 2, overrides={0: frame})))
    none = load_latent_dataset(str(write_latents(tmp_path / "none", 2)))
    for dataset in (every, none):
        check_rows_fit(dataset, "d", TEXT_TO_VIDEO, takes_first_frame=True)
    with pytest.raises(ValueError, match="'clip-0', `condition_shape`: the model takes 0, got 16"):
        check_rows_fit(every, "d", TEXT_TO_VIDEO)
    with pytest.raises(ValueError, match="'clip-1', `condition_shape`: the model takes 16, got 0"):
        check_rows_fit(some, "d", TEXT_TO_VIDEO, takes_first_frame=True)
