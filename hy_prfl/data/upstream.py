"""Imports files of HY-Video-PRFL's preprocessing: one `*_meta_v1.json` and up to five .npy files per clip."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encoding import LatentEncoder, strip_padding
from .hashes import FileHashes, hash_text
from .listed_files import describe_absence
from .manifest import ManifestRow, read_labels, unique_rows
from .preprocessing import pack_row
from .records import parse_json, read_text, read_utf8
from .video import TEMPORAL_STRIDE, VideoError


logger = logging.getLogger(__name__)

# Column -> the fields of upstream's meta files that may hold the path of its .npy file.
ARRAYS = {
    "latents": ("vae_latent_path", "video_vae_latent_path", "latents_path"),
    "condition": ("f1_black_path", "latents_condition_path"),
    "image_embeds": ("imgclip_path", "image_embeds"),
    "prompt_embeds": ("textshort_path", "save_textshort_path", "text_en_path"),
    "long_prompt_embeds": ("textlong_path", "save_textlong_path"),
}


@dataclass(frozen=True, kw_only=True)
class UpstreamRow(ManifestRow):
    """One clip of upstream. `arrays` has the paths of its .npy files, by column; `roots` are the folders to search."""

    arrays: dict[str, str]
    roots: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        return [self.video or Path(self.where), *(self.find(name) for name in self.arrays)]

    @property
    def content(self) -> dict[str, Any]:
        """Content of the row, with the paths of its arrays."""
        return super().content | {name: self.find(name).resolve() for name in self.arrays}

    def find(self, name: str) -> Path:
        """Path of one array in the first root that has it, or in the first root if none has it."""
        candidates = [root / self.arrays[name] for root in self.roots]
        return next((path for path in candidates if path.is_file()), candidates[0])


def read_upstream(path: str | Path, root: str | Path = ".") -> list[UpstreamRow]:
    """
    Read the meta files of upstream.

    Args:
        path (`str` or `Path`):
            A folder of `*_meta_v1.json` files, or a `.list` file with the path of one such file per line.
        root (`str` or `Path`, defaults to `"."`):
            Folder in which upstream ran. Relative paths are looked up beside the file that names them, then here.

    Returns:
        `list[UpstreamRow]`: Each clip once, in the order of the list. Upstream's lists repeat clips, because its
        trainers make one pass over the list. The number of repeats is logged.

    Raises:
        FileNotFoundError: If `path` or a listed file does not exist.
        ValueError: If a meta file is broken, or if two different ones share an id. The message names file and field.
            Missing arrays are not errors here: they concern single clips.
    """
    path, root = Path(path), Path(root)
    if path.is_dir():
        paths = sorted(path.glob("*_meta_v1.json"))
    elif path.is_file():
        lines = [line.strip() for line in read_utf8(path).split("\n")]
        paths = [_find_meta(line, path, root) for line in lines if line]
    else:
        raise FileNotFoundError(f"there is no file or folder '{path}'.")
    if not paths:
        raise ValueError(f"'{path}': no `*_meta_v1.json` files.")
    parsed = {meta: _parse_meta(meta, root) for meta in dict.fromkeys(paths)}
    rows = unique_rows(list(parsed.values()))
    counts = Counter(parsed[meta].id for meta in paths)
    if len(rows) < len(paths):
        least, most = min(counts.values()), max(counts.values())
        uneven = f" Clips are named {least} to {most} times; these weights are not kept." if least < most else ""
        logger.warning(
            f"{path}: {len(paths)} {'files' if path.is_dir() else 'lines'} name {len(rows)} clips. Each is imported once; "
            f"train for more epochs instead of repeating clips.{uneven}"
        )
    return rows


def _find_meta(line: str, list_path: Path, root: Path) -> Path:
    candidates = [list_path.parent / line, root / line]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{list_path}: there is {describe_absence(candidates)}.")


def _parse_meta(path: Path, root: Path) -> UpstreamRow:
    where = str(path)
    record = parse_json(read_utf8(path), where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a mapping of field names to values, got a {type(record).__name__}.")
    arrays = {name: read_text(record, names, where) for name, names in ARRAYS.items()}
    for name in ("latents", "prompt_embeds"):
        if arrays[name] is None:
            raise ValueError(f"{where}: `{ARRAYS[name][0]}` is missing.")
    prompt = read_text(record, ("short_caption", "prompt", "caption"), where)
    long_prompt = read_text(record, ("long_caption",), where)
    video = read_text(record, ("video_path", "video"), where)
    return UpstreamRow(
        where=where,
        id=read_text(record, ("source_id", "id"), where) or path.name.removesuffix(".json").removesuffix("_meta_v1"),
        prompt=prompt or long_prompt or "",
        long_prompt=long_prompt if prompt else None,
        video=Path(video) if video else None,
        pair_id=read_text(record, ("pair_id",), where),
        rejected_id=read_text(record, ("rejected_id",), where),
        labels=read_labels(record, where),
        arrays={name: value for name, value in arrays.items() if value is not None},
        roots=(path.parent, root),
    )


class UpstreamImporter:
    """
    Converts upstream's arrays to dataset rows. Implements `store.RowEncoder`.

    Args:
        encoder (`LatentEncoder`):
            Encoders of the pipeline that made upstream's arrays. They identify the dataset's VAE and encode the empty
            prompt. Image-to-video columns are imported only for an image-to-video pipeline.
        fps (`float`): Frame rate of upstream's clips.
        tensor_dtype (`str`): Storage type, `"float16"` or `"float32"`.
        null_prompt_path (`str`, *optional*): Upstream's null.npy, to use instead of encoding the empty prompt.
        hashes (`FileHashes`, *optional*): Hashes of arrays that are known already.

    Raises:
        ValueError: If the embedding in `null_prompt_path` does not fit.
    """

    def __init__(
        self,
        encoder: LatentEncoder,
        fps: float,
        tensor_dtype: str,
        null_prompt_path: str | None,
        hashes: FileHashes | None = None,
    ) -> None:
        self.encoder = encoder
        self.fps = fps
        self.tensor_dtype = tensor_dtype
        self.hashes = FileHashes() if hashes is None else hashes
        if null_prompt_path is None:
            self.null_prompt_embeds = encoder.encode_prompt("").numpy()
        else:
            self.null_prompt_embeds = self._prepare_prompt_embeds(Path(null_prompt_path))
        self._null_prompt_hash = hash_text(str(self.null_prompt_embeds.tolist()))

    def row_key(self, row: ManifestRow) -> str:
        """Hash of everything that the columns of a row depend on: files, texts, type, encoders."""
        paths = self._paths(row)
        files = {name: self.hashes[path] for name, path in paths.items()}
        settings = [self.fps, self.tensor_dtype, self.encoder.identity, self._null_prompt_hash]
        return hash_text(json.dumps(["upstream", files, row.prompt, row.long_prompt, settings], sort_keys=True))

    def encode_rows(
        self, rows: Sequence[ManifestRow], contents: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any] | VideoError]:
        """Returns `contents`: upstream's arrays are encoded already."""
        return list(contents)

    def read_row(self, row: ManifestRow) -> dict[str, Any]:
        """Packed columns of one row. Raises a `VideoError` if an array does not fit."""
        paths = self._paths(row)
        arrays: dict[str, np.ndarray | None] = {"null_prompt_embeds": self.null_prompt_embeds}
        latents = self._prepare_latents(paths["latents"])
        arrays["latents"] = latents
        for name in ("prompt_embeds", "long_prompt_embeds"):
            if name in paths:
                arrays[name] = self._prepare_prompt_embeds(paths[name])
        if "condition" in paths:
            arrays["condition"] = self._prepare_condition(paths["condition"], latents.shape)
        if "image_embeds" in paths:
            arrays["image_embeds"] = self._prepare_image_embeds(paths["image_embeds"])
        num_latent_frames, latent_height, latent_width = latents.shape[1:]
        return pack_row(
            self.encoder,
            row,
            arrays,
            num_frames=(num_latent_frames - 1) * TEMPORAL_STRIDE + 1,
            height=latent_height * self.encoder.spatial_stride,
            width=latent_width * self.encoder.spatial_stride,
            fps=self.fps,
            tensor_dtype=self.tensor_dtype,
            source_hash=self.hashes[paths["latents"]],
        )

    def _paths(self, row: ManifestRow) -> dict[str, Path]:
        """Arrays that this row needs, by column."""
        assert isinstance(row, UpstreamRow)
        if not row.prompt:
            raise VideoError("no caption")
        names = ["latents", "prompt_embeds"]
        if row.long_prompt is not None:
            names.append("long_prompt_embeds")
        if self.encoder.is_image_to_video:
            names.append("condition")
        if self.encoder.image_encoder_fingerprint is not None:
            names.append("image_embeds")
        paths: dict[str, Path] = {}
        for name in names:
            if name not in row.arrays:
                raise VideoError(f"`{ARRAYS[name][0]}` is missing in {row.where}")
            paths[name] = row.find(name)
            if not paths[name].is_file():
                places = describe_absence([root / row.arrays[name] for root in row.roots])
                raise VideoError(f"`{name}`: there is {places}")
        return paths

    def _prepare_latents(self, path: Path) -> np.ndarray:
        latents = _load_array(path, num_dims=4)
        num_channels = self.encoder.pipeline.vae.config.z_dim
        if latents.shape[0] != num_channels:
            raise VideoError(f"'{path}': expected latents of {num_channels} channels, got shape {latents.shape}")
        if latents.shape[2] % 2 or latents.shape[3] % 2:
            raise VideoError(f"'{path}': height and width of latents must be even, got shape {latents.shape}")
        return latents

    def _prepare_prompt_embeds(self, path: Path) -> np.ndarray:
        prompt_embeds = _load_array(path, num_dims=2)
        text_dim = self.encoder.pipeline.text_encoder.config.d_model
        if prompt_embeds.shape[1] != text_dim:
            raise VideoError(f"'{path}': expected a text width of {text_dim}, got shape {prompt_embeds.shape}")
        prompt_embeds = strip_padding(torch.from_numpy(prompt_embeds)).numpy()
        length = self.encoder.max_sequence_length
        if len(prompt_embeds) > length:
            raise VideoError(f"'{path}': {len(prompt_embeds)} tokens, `max_sequence_length` is {length}")
        return prompt_embeds

    def _prepare_condition(self, path: Path, latents_shape: Sequence[int]) -> np.ndarray:
        """
        Condition with its mask, `(4 + num_channels, num_frames, height, width)`.

        Upstream's files need not have the mask: its trainer adds one that marks only the first frame. Here the mask is
        the pipeline's. For a model that takes a first and a last frame, it marks both.
        """
        condition = _load_array(path, num_dims=4)
        num_channels = latents_shape[0]
        expected = (num_channels, num_channels + TEMPORAL_STRIDE)
        if condition.shape[0] not in expected or condition.shape[1:] != tuple(latents_shape[1:]):
            raise VideoError(
                f"'{path}': expected {expected[0]} or {expected[1]} channels beside latents of shape "
                f"{tuple(latents_shape)}, got shape {condition.shape}"
            )
        # As in `WanImageToVideoPipeline.prepare_latents`: the first latent frame stands for one frame, each of the others
        # for four. So the fourth mask channel of the last latent frame stands for the clip's last frame.
        mask = np.zeros((TEMPORAL_STRIDE, *latents_shape[1:]), dtype=condition.dtype)
        mask[:, 0] = 1
        if self.encoder.uses_last_frame:
            mask[-1, -1] = 1
        if condition.shape[0] == expected[0]:
            return np.concatenate([mask, condition])
        if self.encoder.uses_last_frame and not np.array_equal(condition[:TEMPORAL_STRIDE], mask):
            raise VideoError(f"'{path}': its mask does not mark exactly the first and the last frame")
        return condition

    def _prepare_image_embeds(self, path: Path) -> np.ndarray:
        """Embeddings `(num_tokens, image_dim)`, or `(2, num_tokens, image_dim)` for two images, which may be stored flat."""
        config = self.encoder.pipeline.image_encoder.config
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        num_images = 2 if self.encoder.uses_last_frame else 1
        image_embeds = _read_npy(path)
        shape = image_embeds.shape
        while shape[:1] == (1,):
            shape = shape[1:]
        flat = (num_images * num_tokens, config.hidden_size)
        if shape not in (flat, (num_images, num_tokens, config.hidden_size)):
            raise VideoError(
                f"'{path}': expected {num_images} image{'s' * (num_images > 1)} of {num_tokens} tokens and an image width of "
                f"{config.hidden_size}, got shape {image_embeds.shape}"
            )
        return image_embeds.reshape(flat if num_images == 1 else (num_images, num_tokens, config.hidden_size))


def _load_array(path: Path, num_dims: int) -> np.ndarray:
    """Array of a .npy file as float32, without the batch dimension of 1 that upstream may store."""
    array = _read_npy(path)
    if array.ndim == num_dims + 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != num_dims or array.size == 0:
        raise VideoError(f"'{path}': expected {num_dims} dimensions, got shape {array.shape}")
    return array


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays")
        return array.astype(np.float32)
    except (ValueError, EOFError) as error:
        raise VideoError(f"'{path}' is not a valid .npy file: {error}") from error
