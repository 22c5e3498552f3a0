"""Import of what HY-Video-PRFL's preprocessing wrote: one `*_meta_v1.json` and up to five .npy files per clip."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encoding import LatentEncoder, strip_padding
from .manifest import ManifestRow, check_ids, read_labels
from .preprocessing import pack_row
from .records import parse_json, read_text
from .store import FileHashes, hash_text
from .video import TEMPORAL_STRIDE, VideoError


# Column -> names that upstream's scripts give the path of its .npy file.
ARRAYS = {
    "latents": ("vae_latent_path", "video_vae_latent_path", "latents_path"),
    "condition": ("f1_black_path", "latents_condition_path"),
    "image_embeds": ("imgclip_path", "image_embeds"),
    "prompt_embeds": ("textshort_path", "save_textshort_path", "text_en_path"),
    "long_prompt_embeds": ("textlong_path", "save_textlong_path"),
}


@dataclass(frozen=True, kw_only=True)
class UpstreamRow(ManifestRow):
    """One clip of upstream. `arrays` has the paths of its .npy files as written, by column; `roots` where to look."""

    arrays: dict[str, str]
    roots: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        return [self.video or Path(self.where), *(self.find(name) for name in self.arrays)]

    def find(self, name: str) -> Path:
        """Path of one array: the first of the roots that has it, the first of all if none has."""
        candidates = [root / self.arrays[name] for root in self.roots]
        return next((path for path in candidates if path.is_file()), candidates[0])


def read_upstream(path: str | Path, root: str | Path = ".") -> list[UpstreamRow]:
    """
    Read the meta files of upstream.

    Args:
        path (`str` or `Path`):
            A folder of `*_meta_v1.json` files, or a `.list` file with the path of one such file per line.
        root (`str` or `Path`, defaults to `"."`):
            Folder that upstream ran in. Relative paths are looked up beside the file that names them, then here.

    Raises:
        FileNotFoundError: If `path` or a listed file does not exist.
        ValueError: If a meta file is broken, naming file and field. Whether arrays exist is not checked here: that
            concerns one clip.
    """
    path, root = Path(path), Path(root)
    if path.is_dir():
        paths = sorted(path.glob("*_meta_v1.json"))
    elif path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        paths = [_find_meta(line, path, root) for line in lines if line]
    else:
        raise FileNotFoundError(f"there is no file or folder '{path}'.")
    if not paths:
        raise ValueError(f"'{path}': no `*_meta_v1.json` files.")
    rows = [_parse_meta(meta, root) for meta in paths]
    check_ids(rows)
    return rows


def _find_meta(line: str, list_path: Path, root: Path) -> Path:
    candidates = [list_path.parent / line, root / line]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{list_path}: there is neither '{candidates[0]}' nor '{candidates[1]}'.")


def _parse_meta(path: Path, root: Path) -> UpstreamRow:
    where = str(path)
    record = parse_json(path.read_text(encoding="utf-8-sig"), where)
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
    Makes dataset rows of upstream's arrays: a `store.RowEncoder`.

    Args:
        encoder (`LatentEncoder`):
            Encoders of the pipeline that upstream's arrays were made with. It ties the dataset to a VAE and encodes
            the empty prompt; image-to-video columns are imported for an image-to-video pipeline only.
        fps (`float`): Frame rate of upstream's clips.
        tensor_dtype (`str`): Storage type, `"float16"` or `"float32"`.
        null_prompt_path (`str`, *optional*): Upstream's null.npy, instead of encoding the empty prompt.
        hashes (`FileHashes`, *optional*): Hashes of arrays that are known already.

    Raises:
        ValueError: If the pipeline needs a last frame, which upstream did not keep.
    """

    def __init__(
        self,
        encoder: LatentEncoder,
        fps: float,
        tensor_dtype: str,
        null_prompt_path: str | None,
        hashes: FileHashes | None = None,
    ) -> None:
        if encoder.uses_last_frame:
            raise ValueError("upstream's arrays have the first frame only, the pipeline needs a first and a last one.")
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
        """Hash of all that the columns of a row depend on: files, texts, type, encoders."""
        paths = self._paths(row)
        files = {name: self.hashes[path] for name, path in paths.items()}
        settings = [self.fps, self.tensor_dtype, self.encoder.identity, self._null_prompt_hash]
        return hash_text(json.dumps(["upstream", files, row.prompt, row.long_prompt, settings], sort_keys=True))

    def encode_rows(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | VideoError]:
        """Packed columns of each row, or what does not fit about its arrays."""
        results: list[dict[str, Any] | VideoError] = []
        for row in rows:
            try:
                results.append(self.encode_row(row))
            except VideoError as error:
                results.append(error)
        return results

    def encode_row(self, row: ManifestRow) -> dict[str, Any]:
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
                looked = " nor ".join(f"'{root / row.arrays[name]}'" for root in row.roots)
                raise VideoError(f"`{name}`: there is neither {looked}")
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
        return strip_padding(torch.from_numpy(prompt_embeds)).numpy()

    def _prepare_condition(self, path: Path, latents_shape: Sequence[int]) -> np.ndarray:
        """Condition with its mask; upstream left the mask out in some versions."""
        condition = _load_array(path, num_dims=4)
        num_channels = latents_shape[0]
        expected = (num_channels, num_channels + TEMPORAL_STRIDE)
        if condition.shape[0] not in expected or condition.shape[1:] != tuple(latents_shape[1:]):
            raise VideoError(
                f"'{path}': expected {expected[0]} or {expected[1]} channels beside latents of shape "
                f"{tuple(latents_shape)}, got shape {condition.shape}"
            )
        if condition.shape[0] == expected[1]:
            return condition
        # As `WanImageToVideoPipeline.prepare_latents` builds it: the first latent frame is given, the rest is not.
        mask = np.zeros((TEMPORAL_STRIDE, *latents_shape[1:]), dtype=condition.dtype)
        mask[:, 0] = 1
        return np.concatenate([mask, condition])

    def _prepare_image_embeds(self, path: Path) -> np.ndarray:
        image_embeds = _load_array(path, num_dims=2)
        image_dim = self.encoder.pipeline.image_encoder.config.hidden_size
        if image_embeds.shape[1] != image_dim:
            raise VideoError(f"'{path}': expected an image width of {image_dim}, got shape {image_embeds.shape}")
        return image_embeds


def _load_array(path: Path, num_dims: int) -> np.ndarray:
    """Array of a .npy file as float32, without the batch dimension of 1 that upstream stored."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise VideoError(f"'{path}' is no valid .npy file: {error}") from error
    if array.ndim == num_dims + 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != num_dims or array.size == 0:
        raise VideoError(f"'{path}': expected {num_dims} dimensions, got shape {array.shape}")
    return array.astype(np.float32)
