"""Collates rows of a latent dataset into batches of tensors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from .schema import PROMPTS, task_label, unpack_tensor


BatchT = TypeVar("BatchT", bound="Batch")


class Batch:
    """A dataclass of tensors, lists and nested batches."""

    def to(self: BatchT, device: torch.device, embeds_dtype: torch.dtype = torch.float32) -> BatchT:
        """
        Copy on `device`, in the types that models and losses compute in.

        Batches hold tensors in the type of the dataset, usually float16. They are cast only here, on the device.
        DeepSpeed in bfloat16 casts no inputs and has no autocast, so embeddings must have the model's type.

        Args:
            embeds_dtype (`torch.dtype`, defaults to `torch.float32`):
                Type of prompt and image embeddings. All other tensors become float32.
        """
        return self._map(
            lambda name, value: value.to(device).to(embeds_dtype if name in _EMBEDDINGS else torch.float32),
            lambda batch: batch.to(device, embeds_dtype),
        )

    def pin_memory(self: BatchT) -> BatchT:
        """Copy with every tensor in page-locked memory. The data loader calls this."""
        return self._map(lambda name, value: value.pin_memory(), lambda batch: batch.pin_memory())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a worker process sends."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return sum(value.nbytes for value in values if isinstance(value, (torch.Tensor, Batch)))

    def _map(
        self: BatchT, of_tensor: Callable[[str, torch.Tensor], torch.Tensor], of_batch: Callable[["Batch"], "Batch"]
    ) -> BatchT:
        """Copy with `of_tensor(name of the field, tensor)` for each tensor and `of_batch(batch)` for each nested batch."""
        mapped: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = of_tensor(field.name, value)
            elif isinstance(value, Batch):
                value = of_batch(value)
            mapped[field.name] = value
        return type(self)(**mapped)


@dataclass(kw_only=True)
class LatentBatch(Batch):
    """
    Clips of one shape, or only their prompts. Tensors have the dataset's storage type until [`~Batch.to`] casts them.

    Args:
        ids (`list[str]`):
            Row ids, for messages.
        latents_shape (`tuple[int, ...]`):
            Shape `(num_channels, num_frames, height, width)` of one sample.
        latents (`torch.Tensor` of shape `(batch_size, num_channels, num_frames, height, width)`, *optional*):
            Clean normalised latents. None in a prompt-only batch.
        prompt_embeds, long_prompt_embeds, null_prompt_embeds
            (`torch.Tensor` of shape `(batch_size, max_sequence_length, text_dim)`):
            Embeddings of the caption, the long caption (or the caption, where a row has no long one) and the empty
            prompt, zero-padded.
        num_tokens (`int`):
            Tokens of the longest prompt. Only these tokens are sent from worker processes and copied to a device; the
            padding is added again afterwards.
        image_embeds (`torch.Tensor` of shape `(batch_size, num_image_tokens, image_dim)`, *optional*):
            CLIP embeddings of the first frame, for image-to-video models. For models that take a first and a last frame,
            the first dimension is `2 * batch_size`, with the two embeddings of a clip next to each other.
        condition (`torch.Tensor` of shape `(batch_size, 20, num_frames, height, width)`, *optional*):
            Mask and latents of the images, for image-to-video models. For Wan2.2 TI2V 5B the latents of the clean first
            frame, `(batch_size, 48, 1, height, width)`.
    """

    ids: list[str]
    latents_shape: tuple[int, ...]
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor
    long_prompt_embeds: torch.Tensor
    null_prompt_embeds: torch.Tensor
    num_tokens: int
    image_embeds: torch.Tensor | None
    condition: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device, embeds_dtype: torch.dtype = torch.float32) -> "LatentBatch":
        """Copy on `device`, see [`Batch.to`]."""
        moved = Batch.to(dataclasses.replace(self, **self._trimmed_prompts()), device, embeds_dtype)
        return dataclasses.replace(moved, **_padded_prompts(vars(moved), self.prompt_embeds.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes that a worker process sends, see [`Batch.nbytes`]."""
        padded = sum(getattr(self, name).nbytes for name in PROMPTS)
        return super().nbytes - padded + sum(value.nbytes for value in self._trimmed_prompts().values())

    def __getstate__(self) -> dict[str, Any]:
        """State that a worker process sends. Slices are copied, because a slice would be sent with its whole memory."""
        prompts = {name: value.clone() for name, value in self._trimmed_prompts().items()}
        return vars(self) | prompts | {"max_sequence_length": self.prompt_embeds.shape[1]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        length = state.pop("max_sequence_length")
        vars(self).update(state | _padded_prompts(state, length))

    def _trimmed_prompts(self) -> dict[str, Any]:
        return {name: getattr(self, name)[:, : self.num_tokens] for name in PROMPTS}

    @classmethod
    def concatenate(cls, batches: Sequence["LatentBatch"]) -> "LatentBatch":
        """One batch with the clips of several batches of one shape."""
        joined: dict[str, Any] = {"latents_shape": batches[0].latents_shape}
        joined["num_tokens"] = max(batch.num_tokens for batch in batches)
        for name in ("latents", "image_embeds", "condition", *PROMPTS):
            tensors = [getattr(batch, name) for batch in batches]
            joined[name] = None if tensors[0] is None else torch.cat(tensors)
        return cls(ids=[row_id for batch in batches for row_id in batch.ids], **joined)


@dataclass(kw_only=True)
class LabeledBatch(Batch):
    """Clips and the label of each, `labels` `(batch_size,)` in {0, 1}."""

    clips: LatentBatch
    labels: torch.Tensor

    @property
    def ids(self) -> list[str]:
        """Row ids, for messages."""
        return self.clips.ids


@dataclass(kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of clips of one shape; `chosen` and `rejected` are aligned."""

    chosen: LatentBatch
    rejected: LatentBatch

    @property
    def ids(self) -> list[str]:
        """Row ids, for messages."""
        return self.chosen.ids + self.rejected.ids


def collate_latents(rows: Sequence[dict[str, Any]]) -> LatentBatch:
    """
    Stack rows of one latent shape and zero-pad their prompt embeddings.

    Raises:
        ValueError: If rows differ in shape or in their columns.
    """
    shapes = {tuple(row["latents_shape"]) for row in rows}
    if len(shapes) > 1:
        raise ValueError(f"Rows {[row['id'] for row in rows]} have latents of different shapes: {sorted(shapes)}.")
    length = rows[0]["max_sequence_length"]
    prompts = {name: [unpack_tensor(row, name) for row in rows] for name in PROMPTS}
    # A row without a long caption uses its caption.
    prompts["long_prompt_embeds"] = [
        short if long is None else long
        for short, long in zip(prompts["prompt_embeds"], prompts["long_prompt_embeds"], strict=True)
    ]
    image_embeds = _stack(rows, "image_embeds")
    return LatentBatch(
        ids=[row["id"] for row in rows],
        latents_shape=shapes.pop(),
        latents=_stack(rows, "latents"),
        **{name: _stack_prompts(rows, embeds, length) for name, embeds in prompts.items()},
        num_tokens=max(len(array) for embeds in prompts.values() for array in embeds if array is not None),
        image_embeds=None if image_embeds is None else image_embeds.flatten(0, -3),
        condition=_stack(rows, "condition"),
    )


def collate_labeled(rows: Sequence[dict[str, Any]], task: str) -> LabeledBatch:
    """Stack rows and their labels for `task`, which must be known."""
    labels = [task_label(row, task) for row in rows]
    return LabeledBatch(clips=collate_latents(rows), labels=torch.tensor(labels, dtype=torch.float32))


def collate_preferences(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> PreferenceBatch:
    """Stack `(chosen row, rejected row)` pairs."""
    chosen, rejected = zip(*pairs, strict=True)
    return PreferenceBatch(chosen=collate_latents(chosen), rejected=collate_latents(rejected))


_EMBEDDINGS = (*PROMPTS, "image_embeds")


def _stack(rows: Sequence[dict[str, Any]], name: str) -> torch.Tensor | None:
    arrays = [unpack_tensor(row, name) for row in rows]
    present = [array for array in arrays if array is not None]
    if not present:
        return None
    if len(present) < len(arrays):
        lacking = [row["id"] for row, array in zip(rows, arrays, strict=True) if array is None]
        raise ValueError(f"Rows {lacking} have no `{name}`, but others of the same batch have one.")
    return torch.from_numpy(np.stack(present))


def _stack_prompts(rows: Sequence[dict[str, Any]], embeds: Sequence[np.ndarray | None], length: int) -> torch.Tensor:
    """Embeddings `(batch_size, length, text_dim)`, copied once into zero-filled memory."""
    stacked: np.ndarray | None = None
    for index, (row, array) in enumerate(zip(rows, embeds, strict=True)):
        if array is None:
            raise ValueError(f"Row '{row['id']}' lacks the embedding of its prompt or of the empty prompt.")
        if array.shape[0] > length or row["max_sequence_length"] != length:
            raise ValueError(
                f"Row '{row['id']}': {array.shape[0]} tokens, `max_sequence_length` {row['max_sequence_length']}, "
                f"in a batch padded to {length}."
            )
        if stacked is None:
            stacked = np.zeros((len(rows), length, array.shape[1]), array.dtype)
        stacked[index, : len(array)] = array
    return torch.from_numpy(stacked)


def _padded_prompts(prompts: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Prompt embeddings of a batch, padded with zeros to `length` tokens again."""
    padded = {}
    for name in PROMPTS:
        value = prompts[name]
        padded[name] = value.new_zeros(value.shape[0], length, value.shape[2])
        padded[name][:, : value.shape[1]] = value
    return padded
