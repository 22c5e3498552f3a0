"""The rows of a latent dataset: columns, types, meaning of labels, and conversion to and from Arrow."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, LargeList, List, Value

from .records import is_missing


LABELS = ("text_alignment", "blur_quality", "physics_quality", "human_quality")
TASKS = (*LABELS, "motion_quality")

PROMPTS = ("prompt_embeds", "null_prompt_embeds", "long_prompt_embeds")
TENSORS = ("latents", *PROMPTS, "image_embeds", "condition")


def latent_features(dtype: str = "float16") -> Features:
    """
    Column types of a latent dataset.

    Tensors are stored flat, next to a `<name>_shape` column, because `datasets` has no array type whose shape varies
    from row to row:

    - `latents` `(num_channels, num_frames, height, width)`: normalised VAE latents. Null in a prompt-only dataset, where
      `latents_shape` is the shape of the latents to generate.
    - `prompt_embeds`, `long_prompt_embeds`, `null_prompt_embeds` `(num_tokens, text_dim)`: embeddings of the caption, of
      the long caption if there is one, and of the empty prompt, without padding.
    - `image_embeds` `(num_image_tokens, image_dim)` and `condition` `(20, num_frames, height, width)`: for image-to-video
      models, null in a text-to-video dataset. The condition consists of 4 mask channels and the 16 latent channels of
      the first frame. For models that take a first and a last frame, `image_embeds` is
      `(2, num_image_tokens, image_dim)`, and the condition has the latents of both. For Wan2.2 TI2V 5B the condition is
      the clean first latent frame, `(48, 1, height, width)`.

    Labels are 1 (good), 0 (poor) or null (unknown). `rejected_id` is the id of the row that this row was preferred to.
    Rows with the same `pair_id` show the same scene and are compared by their labels.

    Args:
        dtype (`str`, defaults to `"float16"`):
            Storage type of the tensors, `"float16"` or `"float32"`.
    """
    columns: dict[str, Any] = {"id": Value("string"), "prompt": Value("string"), "long_prompt": Value("string")}
    for name in TENSORS:
        columns[name] = LargeList(Value(dtype))
        columns[f"{name}_shape"] = List(Value("int32"))
    for name in LABELS:
        columns[name] = Value("int8")
    columns |= {
        "pair_id": Value("string"),
        "rejected_id": Value("string"),
        "num_frames": Value("int32"),
        "height": Value("int32"),
        "width": Value("int32"),
        "fps": Value("float32"),
        "source": Value("string"),
        "source_hash": Value("string"),
        "max_sequence_length": Value("int32"),
        "vae_fingerprint": Value("string"),
        "text_encoder_fingerprint": Value("string"),
    }
    return Features(columns)


def validate_columns(columns: Iterable[str], source: str) -> None:
    """Raise a `ValueError` that names `source` and the missing columns, if there are any."""
    missing = sorted(set(latent_features()) - set(columns))
    if missing:
        raise ValueError(
            f"{source}: not a latent dataset, these columns are missing: {', '.join(missing)}. "
            "Write it with `hy-prfl preprocess`."
        )


def parse_label(value: Any, *, source: str, name: str) -> int | None:
    """
    Parse one label, in any of the spellings of manifests and of upstream.

    1, 1.0, "1", true and "good" mean good; 0, 0.0, "0", false and "poor" mean poor; None, NaN, "", "null", "nan", "N/A"
    and the like mean missing.

    Raises:
        ValueError: For any other value. The message names `source`, the label and the value.
    """
    if is_missing(value):
        return None
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true", "good"):
        return 1
    if text in ("0", "0.0", "false", "poor"):
        return 0
    raise ValueError(f"{source}: `{name}` must be 1, 0, 'good', 'poor' or null, got {value!r}.")


def task_label(row: Mapping[str, Any], task: str) -> int | None:
    """
    Label of one row for one task, or None if it is unknown.

    `motion_quality` is `physics_quality AND human_quality`. It is unknown if either of the two is unknown.
    """
    if task == "motion_quality":
        physics, human = row["physics_quality"], row["human_quality"]
        return None if physics is None or human is None else int(physics == 1 and human == 1)
    return row[task]


def pack_tensor(name: str, array: np.ndarray | None, dtype: str, *, source: str) -> dict[str, Any]:
    """
    Turn an array into its two columns, `name` and `name_shape`.

    Raises:
        ValueError: If a value is not finite or overflows `dtype`. The message names `source` and the column.
    """
    if array is None:
        return {name: None, f"{name}_shape": None}
    if not np.isfinite(array).all():
        raise ValueError(f"{source}: `{name}` holds a NaN or an infinity.")
    largest = float(np.abs(array).max(initial=0.0))
    if largest > float(np.finfo(dtype).max):
        raise ValueError(f"{source}: `{name}` reaches {largest:.6g}, which overflows {dtype}; store it as float32.")
    return {name: array.astype(dtype).reshape(-1), f"{name}_shape": list(array.shape)}


def unpack_tensor(row: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Array of one column of a row from `table_to_rows`, in its stored type and shape. None if it is null."""
    if row[name] is None or row[f"{name}_shape"] is None:
        return None
    return np.asarray(row[name]).reshape([int(size) for size in row[f"{name}_shape"]])


def rows_to_table(rows: Sequence[Mapping[str, Any]], dtype: str = "float16") -> pa.Table:
    """Arrow table of packed rows (see `pack_tensor`). Columns that a row does not have are null."""
    arrow_schema = latent_features(dtype).arrow_schema
    columns = []
    for column in arrow_schema:
        values = [row.get(column.name) for row in rows]
        if column.name in TENSORS:
            columns.append(_large_list_array(values, column.type))
        else:
            columns.append(pa.array(values, type=column.type))
    return pa.Table.from_arrays(columns, schema=arrow_schema)


def table_to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """
    Rows of an Arrow table as Python values, with tensors as flat numpy arrays in their stored type.

    For tables from `Dataset.with_format("arrow")`. This is two hundred times faster than Python lists. Unlike the numpy
    format, it keeps float16 and distinguishes a missing label from NaN.
    """
    rows: list[dict[str, Any]] = [{} for _ in range(table.num_rows)]
    for name in table.column_names:
        for row, scalar in zip(rows, table.column(name), strict=True):
            if name in TENSORS and scalar.is_valid:
                row[name] = scalar.values.to_numpy(zero_copy_only=False)
            else:
                row[name] = scalar.as_py()
    return rows


def _large_list_array(values: Sequence[np.ndarray | None], arrow_type: pa.DataType) -> pa.Array:
    """Large-list array made directly from flat numpy arrays, without Python lists."""
    lengths = [0 if value is None else value.size for value in values]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), type=pa.int64())
    present = [value for value in values if value is not None]
    dtype = arrow_type.value_type.to_pandas_dtype()
    flat = np.concatenate(present) if present else np.zeros(0, dtype)
    mask = pa.array([value is None for value in values], type=pa.bool_())
    return pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(dtype, copy=False)), type=arrow_type, mask=mask)
