"""Whether models, datasets and encoders fit together. All of it is told by configurations and small columns."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .data.dataset import read_columns, require_latents, single_value
from .data.encoding import LatentEncoder
from .models.reward_model import WanRewardModel


# What a dataset or an encoder has to agree with.
REWARD_LATENTS = "the latents that the reward model was trained on"


def check_same_vae(found: str | None, expected: str | None, *, source: str, of: str) -> None:
    """
    Refuse latents of another VAE; what is not known is not compared.

    Args:
        found, expected (`str`, *optional*):
            Fingerprints, see [`~hy_prfl.data.encoding.vae_fingerprint`].
        source, of (`str`):
            What has the one, and what has the other, for the message.

    Raises:
        ValueError: If they differ.
    """
    if None not in (found, expected) and found != expected:
        raise ValueError(f"{source}: of another VAE than {of}: `vae_fingerprint` {found} against {expected}.")


def check_vae(dataset: Dataset, source: str, vae_fingerprint: str | None, *, of: str = "the pipeline") -> None:
    """Raise a `ValueError` if rows were encoded by different VAEs, or by another one than that with this fingerprint."""
    check_same_vae(single_value(dataset, "vae_fingerprint", source), vae_fingerprint, source=source, of=of)


def check_fits_generator(
    reward_config: Mapping[str, Any],
    transformer_config: Mapping[str, Any],
    *,
    allow_other_base: bool = False,
    name: str = "The reward model",
) -> None:
    """
    Refuse a reward model that cannot judge a generator's latents. Needs their configurations only.

    Args:
        reward_config, transformer_config (`Mapping[str, Any]`):
            `config` of a [`WanRewardModel`] and of a `WanTransformer3DModel`.
        allow_other_base (`bool`, defaults to `False`):
            Accept a reward model made from a transformer of another architecture (say 1.3B judging 14B), as long as
            both take the same latents, text and image embeddings.
        name (`str`, defaults to `"The reward model"`):
            What the message calls it.

    Raises:
        ValueError: Naming every field that differs, with both values.
    """
    fields = {name: name for name in ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")}
    if not allow_other_base:
        fields |= {name: name for name in ("num_attention_heads", "attention_head_dim", "ffn_dim")}
        if reward_config["base_num_layers"] is not None:
            fields["base_num_layers"] = "num_layers"
    different = [
        f"`{name}` {reward_config[name]} against {transformer_config[of_base]}"
        for name, of_base in fields.items()
        if _plain(reward_config[name]) != _plain(transformer_config[of_base])
    ]
    if different:
        hint = "" if allow_other_base else " With `allow_other_base` only latents, text and image must agree."
        raise ValueError(f"{name} does not fit the generator: {', '.join(different)}.{hint}")


def check_rows_fit(
    dataset: Dataset,
    source: str,
    model_config: Mapping[str, Any],
    *,
    takes_first_frame: bool = False,
    ignores_images: bool = False,
) -> None:
    """
    Refuse rows that a model cannot take, without reading their tensors.

    Args:
        model_config (`Mapping[str, Any]`):
            Configuration of a transformer or a reward model.
        takes_first_frame (`bool`, defaults to `False`):
            Whether the condition may be a clean first latent frame, in all rows, instead of more channels.
        ignores_images (`bool`, defaults to `False`):
            Whether a text-to-video model may be given rows with images, which it then does not see.

    Raises:
        ValueError: Naming the row, the column and both values.
    """
    num_channels, image_dim = model_config["out_channels"], model_config["image_dim"]
    condition_channels, patch_size = model_config["in_channels"] - num_channels, model_config["patch_size"]
    columns = ["id", "latents_shape", "prompt_embeds_shape", "image_embeds_shape", "condition_shape"]
    rows = read_columns(dataset, columns)
    if takes_first_frame and rows[0]["condition_shape"] is not None:
        condition_channels = num_channels
    for row in rows:
        where = f"{source}: row '{row['id']}'"
        shape, image_shape, condition_shape = row["latents_shape"], row["image_embeds_shape"], row["condition_shape"]
        found = {
            "latents_shape": (shape[0], num_channels),
            "prompt_embeds_shape": (row["prompt_embeds_shape"][1], model_config["text_dim"]),
            "image_embeds_shape": (None if image_shape is None else image_shape[-1], image_dim),
            "condition_shape": (0 if condition_shape is None else condition_shape[0], condition_channels),
        }
        if ignores_images and image_dim is None:
            del found["image_embeds_shape"]
        if ignores_images and condition_channels == 0:
            del found["condition_shape"]
        for name, (value, expected) in found.items():
            if value != expected:
                raise ValueError(f"{where}, `{name}`: the model takes {expected}, got {value}.")
        if image_dim is not None:
            _check_number_of_images(image_shape, model_config["pos_embed_seq_len"], where)
        if any(size % patch for size, patch in zip(shape[1:], patch_size, strict=True)):
            raise ValueError(f"{where}: latents of size {shape[1:]} cannot be divided into patches of {patch_size}.")


def check_dataset_fits(reward_model: WanRewardModel, dataset: Dataset, source: str = "the dataset") -> None:
    """
    Refuse a latent dataset that a reward model cannot judge.

    Raises:
        ValueError: If it comes from another VAE, has rows without latents, or rows that [`check_rows_fit`] refuses.
    """
    check_vae(dataset, source, reward_model.config.vae_fingerprint, of=REWARD_LATENTS)
    require_latents(dataset, source)
    check_rows_fit(dataset, source, reward_model.config, ignores_images=True)


def check_encoder_fits(reward_model: WanRewardModel, encoder: LatentEncoder) -> None:
    """
    Refuse encoders whose latents or prompts are not those that a reward model was trained on.

    Raises:
        ValueError: Naming what differs, with both values.
    """
    config, pipeline = reward_model.config, encoder.pipeline
    check_same_vae(encoder.vae_fingerprint, config.vae_fingerprint, source="the pipeline", of=REWARD_LATENTS)
    for what, expected, found in (
        ("latent channels", config.out_channels, pipeline.vae.config.z_dim),
        ("text width", config.text_dim, pipeline.text_encoder.config.d_model),
    ):
        if expected != found:
            raise ValueError(f"the pipeline: {what}: the reward model takes {expected}, got {found}.")
    if config.in_channels > config.out_channels and not encoder.is_image_to_video:
        raise ValueError("The reward model is image-to-video, the pipeline is text-to-video and makes no `condition`.")
    if config.image_dim is not None and pipeline.image_encoder is None:
        raise ValueError("The reward model takes image embeddings, the pipeline has no image encoder.")
    takes_two = config.pos_embed_seq_len is not None
    if config.image_dim is not None and takes_two != encoder.uses_last_frame:
        number, given = ("first and last image", "the first") if takes_two else ("first image only", "both")
        raise ValueError(f"The reward model takes the {number}, the pipeline encodes {given}.")


def _check_number_of_images(image_shape: list[int], pos_embed_seq_len: int | None, where: str) -> None:
    """Refuse image embeddings of one image for a model of two, and vice versa."""
    expected = "1 image" if pos_embed_seq_len is None else f"2 images of {pos_embed_seq_len // 2} tokens"
    found = "1 image" if len(image_shape) == 2 else f"{image_shape[0]} images of {image_shape[1]} tokens"
    if expected != found:
        raise ValueError(f"{where}, `image_embeds_shape`: the model takes {expected}, got {found}.")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
