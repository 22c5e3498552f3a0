"""Inputs of a measurement: a pipeline and a reward model with random weights, and rows of random latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.synthetic import synthetic_dataset
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.loading import TRANSFORMER_FOLDER
from hy_prfl.models.reward_model import WanRewardModel


def write_models(
    folder: Path,
    *,
    num_reward_layers: int = 2,
    reward_options: Mapping[str, object] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **pipeline_options: object,
) -> None:
    """
    Write `folder/pipeline`, and `folder/reward` made from the first blocks of its generator.

    Args:
        num_reward_layers (`int`, defaults to 2):
            Blocks of the reward model.
        reward_options (`Mapping`, *optional*):
            Other arguments of [`WanRewardModel`].
        device (`str`, defaults to `"cpu"`):
            Device on which random weights are drawn. 14 billion of them take long on a CPU.
        dtype (`torch.dtype`, defaults to `torch.float32`):
            Type of the weights in the files.
        pipeline_options:
            Arguments of [`~hy_prfl.inference.tiny_pipelines.build_pipeline`].
    """
    with torch.device(device):
        pipeline = build_pipeline(**pipeline_options)  # type: ignore[arg-type]
        to_dtype(pipeline.components, dtype)
        pipeline.save_pretrained(folder / "pipeline")
        torch.manual_seed(0)
        reward_model = WanRewardModel.from_transformer(
            pipeline.transformer,
            num_layers=num_reward_layers,
            vae_fingerprint=fingerprint_of(folder),
            **(reward_options or {}),
        )
    to_dtype({"reward_model": reward_model}, dtype)
    reward_model.save_pretrained(folder / "reward")


def to_dtype(components: Mapping[str, object], dtype: torch.dtype) -> None:
    """Cast the parameters of all models. Loading casts sensitive parameters back to float32."""
    for component in components.values():
        for parameter in component.parameters() if isinstance(component, torch.nn.Module) else ():
            parameter.data = parameter.data.to(dtype)


def write_rows(
    folder: Path,
    name: str = "data",
    *,
    latents_shape: Sequence[int],
    num_rows: int = 4,
    text_tokens: int = 3,
    max_sequence_length: int = 16,
) -> None:
    """
    Write a dataset `folder/name` for the models that `write_models` wrote to `folder`.

    Args:
        latents_shape (`Sequence[int]`):
            `(num_channels, num_frames, height, width)` of every row.
        num_rows, text_tokens, max_sequence_length (`int`):
            See [`~hy_prfl.data.synthetic.synthetic_dataset`].
    """
    config = WanTransformer3DModel.load_config(folder / "pipeline", subfolder=TRANSFORMER_FOLDER)
    dataset = synthetic_dataset(
        latents_shape=latents_shape,
        text_dim=config["text_dim"],
        vae_fingerprint=fingerprint_of(folder),
        text_tokens=text_tokens,
        max_sequence_length=max_sequence_length,
        num_rows=num_rows,
        dtype="float32",
    )
    dataset.save_to_disk(folder / name)


def fingerprint_of(folder: Path) -> str:
    """Fingerprint of the VAE of `folder/pipeline`, as the trainers compute it."""
    return vae_fingerprint(AutoencoderKLWan.from_pretrained(folder / "pipeline", subfolder="vae"))
