"""The keys of HY-Video-PRFL's YAML files: which ones its code reads, and which ones of a file are converted so far."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..configs.yaml_file import read_yaml
from .converted_recipe import ConvertedRecipe


def _names(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" if section else name for name in names.split()]


# Read by all scripts except preprocessing.
_READ_BY_ALL = [
    *_names("", "task train_id save.output_dir"),
    *_names("model", "base_path init_transformer_path resume_transformer_path patch_size"),
    *_names("model", "gradient_checkpointing selective_checkpointing"),
    *_names("model.lora", "use_lora lora_rank target_modules resume_lora_path"),
    *_names("model", "ema.use_ema fsdp.fsdp_sharding_startegy fsdp.use_cpu_offload"),
    *_names("extra_model", "vae.name scheduler.flow_shift scheduler.num_train_timesteps"),
    *_names("dataset", "uncond_prob sp_size batch_size crop_ratio crop_type"),
    *_names("train", "seed precision allow_tf32 sanity_check_interval gradient_accumulation_steps"),
    *_names("lrm", "trainable_blocks feature_layer pool mlp_dim"),
    *_names("lrm.query_attention", "num_queries num_heads dropout layer_norm return_type product_text text_dim"),
]
_READ_BY_TRAINING = [
    *_READ_BY_ALL,
    *_names("", "model.ema.ema_decay dataset.meta_file_list dataset.num_workers train.save_interval"),
    *_names("extra_model.scheduler", "weighting_scheme logit_mean logit_std"),
    *_names("optimizer", "learning_rate adam_beta1 adam_beta2 weight_decay max_train_steps"),
    *_names("optimizer", "lr_scheduler lr_warmup_steps lr_num_cycles lr_power"),
]
_READ_FOR_REWARDS = [
    *_names("model", "resume_mlp_path resume_query_attention_path"),
    *_names("", "dataset.val_meta_file_list eval.seed lrm.loss lrm.task"),
]
# Command -> the keys that upstream's script for it reads.
READ_KEYS: Mapping[str, frozenset[str]] = {
    "preprocess": frozenset(
        _names("", "json_path save_dir resolution aspect_ratio num_frames start_idx extract_fps seed precision")
        + _names("", "vae_path image_encoder_path image_processor_path text_encoder_path tokenizer_path")
        + _names("", "model_type max_sequence_length")
    ),
    "train_reward": frozenset(
        [*_READ_BY_TRAINING, *_READ_FOR_REWARDS, "dataset.meta_file_lose_list", "optimizer.learning_rate_mlp"]
        + ["eval.timestep", "lrm.timestep"]
    ),
    "train_prfl": frozenset(
        _READ_BY_TRAINING + _names("model", "lrm_transformer_path lrm_mlp_path lrm_query_attention_path")
    ),
    "score": frozenset(_READ_BY_ALL + _READ_FOR_REWARDS),
}
_UNREAD = "no line of upstream's code reads it"
_REPLACED = "upstream's code replaces it by its own path"
# Keys in upstream's files that none of its scripts reads. `task` in its preprocessing files is not read either.
DEAD_KEYS: Mapping[str, str] = {
    **dict.fromkeys(_names("", "base_dir batch_size end_idx fps sample_n_frames"), _UNREAD),
    "extra_model.vae.vae_stride": "a constant of the VAE; " + _UNREAD,
    **dict.fromkeys(_names("extra_model.text_encoder", "t5_text_len t5_checkpoint t5_tokenizer"), _UNREAD),
    **dict.fromkeys(_names("extra_model.image_encoder", "clip_checkpoint clip_tokenizer"), _UNREAD),
    "extra_model.scheduler.mode_scale": _UNREAD,
    **dict.fromkeys(_names("dataset", "sp_batch_size group_frame group_resolution negative_prompt"), _UNREAD),
    **dict.fromkeys(_names("train", "extra_precision teacher_student_parallel dpo_beta"), _UNREAD),
    **dict.fromkeys(_names("save", "log_dir sanity_check_dir"), _REPLACED),
}
ALL_KEYS = frozenset().union(*READ_KEYS.values(), DEAD_KEYS)


class RecipeKeys:
    """
    The keys of one file by dotted name, and which of them are converted.

    Args:
        path (`Path`): The file.
        root (`str`): Folder in which upstream ran, where relative paths in the file start.
        ignore (sequence of `str`): Keys to ignore.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a YAML mapping, if a value is an interpolation, or if `ignore` names a key that is not
            there.
    """

    def __init__(self, path: Path, root: str = ".", ignore: Sequence[str] = ()) -> None:
        values = read_yaml(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of sections, got {type(values).__name__}.")
        self.path = path
        self.root = root
        self.values = flatten(values)
        self.recipe = ConvertedRecipe(path, "")
        # The pipeline in diffusers' format, and the folder for datasets that its encoders make.
        self.pipeline = ""
        self.data_folder = "data"
        # Keys that are left out, by reason, and the dataset of each group of imported lists.
        self.dropped: dict[str, list[str]] = {}
        self.datasets: dict[tuple[str, ...], str] = {}
        for key in ignore:
            if key not in self.values:
                raise ValueError(f"{path}: `ignore_keys` names '{key}', which is not in the file.")
            self.note(f"{key}: {self.values.pop(key)}: left out because of ignore_keys.")
        self.left = set(self.values)
        for key, value in self.values.items():
            if "${" in str(value):
                self.refuse(key, "a plain value; `${...}` is not resolved here")

    def drop_unread(self, command: str) -> None:
        """Note the keys that upstream's script for a command does not read."""
        for key in sorted(self.left - READ_KEYS[command]):
            if key in DEAD_KEYS:
                self.drop(key, DEAD_KEYS[key])
            elif key in ALL_KEYS:
                self.drop(key, "upstream's script for this kind of recipe does not read it")
            else:
                close = difflib.get_close_matches(key, sorted(READ_KEYS[command] - set(self.values)), n=1)
                hint = f"; did you mean `{close[0]}`?" if close else ""
                self.drop(key, f"not a key of upstream: neither its files nor its code name it{hint}")

    def take(self, key: str, default: Any = None) -> Any:
        """Value of a key, `default` if it is missing or null."""
        self.left.discard(key)
        value = self.values.get(key)
        return default if value is None or value == "" else value

    def require(self, key: str) -> Any:
        """Value of a key that upstream's code requires."""
        value = self.take(key)
        if value is None:
            close = difflib.get_close_matches(key, sorted(set(self.values) - ALL_KEYS), n=1)
            hint = f" Is it what the file calls `{close[0]}`?" if close else ""
            raise ValueError(f"{self.path}: `{key}` is missing; upstream's code needs it.{hint}")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """A number: PyYAML reads `1e-6` as a string, and upstream writes `5.` for 5."""
        value = self.take(key, default)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            self.refuse(key, "a number")
        return int(number) if number.is_integer() else number

    def whole(self, key: str, default: int | None = None) -> Any:
        """A whole number."""
        number = self.number(key, default)
        if isinstance(number, float):
            self.refuse(key, "a whole number")
        return number

    def flag(self, key: str) -> bool:
        """True or false, false if the key is missing."""
        value = self.take(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def choice(self, key: str, choices: Mapping[str, Any]) -> Any:
        """The entry of `choices` for a key's value; None if the key is missing or null."""
        value = self.take(key)
        if value is not None and value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return None if value is None else choices[value]

    def option(self, name: str, value: Any, origin: str) -> None:
        """Set an option; `origin` says where its value comes from."""
        if value is not None:
            self.recipe.options[name] = value
            self.recipe.origins[name] = origin

    def carry(self, key: str, name: str, read: Callable[[str], Any] | None = None) -> None:
        """Convert one required key to the option `name`."""
        self.require(key)
        self.option(name, self.take(key) if read is None else read(key), key)

    def expect(self, key: str, value: Any, wanted: str, reason: str) -> None:
        """Refuse all values of a key except `value`, and note why that value needs no option."""
        if self.values.get(key) not in (None, value):
            self.refuse(key, wanted)
        self.drop(key, reason)

    def drop(self, key: str, reason: str) -> None:
        """Note that a key, or all keys of a section, are not carried over. Keys without a value need no note."""
        for name in sorted(self.left):
            if name == key or name.startswith(f"{key}."):
                self.left.discard(name)
                if self.values[name] is not None:
                    self.dropped.setdefault(reason, []).append(f"{name}: {self.values[name]}")

    def finish(self) -> ConvertedRecipe:
        """The recipe with its notes. Keys that were left out come last, grouped by reason."""
        assert not self.left, self.left
        for reason, dropped in self.dropped.items():
            self.note(f"{'; '.join(dropped)}: {reason}.")
        return self.recipe

    def note(self, text: str) -> None:
        """Add a note for the user, on one line."""
        self.recipe.notes.append(" ".join(text.split()))

    def run_first(self, command: str) -> None:
        """Add a shell command to run before the recipe, unless it is in the list already."""
        if command not in self.recipe.first:
            self.recipe.first.append(command)

    def locate(self, path: Any) -> str:
        """A path of the file as seen from the current folder."""
        return str(path) if self.root == "." else os.path.join(self.root, str(path))

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raise a `ValueError` for a value without a counterpart."""
        raise ValueError(f"{self.path}: `{key}` must be {wanted}, got {self.values.get(key)!r}.")


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
