"""Recognises pipelines in Wan's native format, which are not supported, and names the same model in diffusers' format."""

import json
import re
from pathlib import Path
from typing import Any


# Native repository of `Wan-AI` -> the same model in diffusers' format, and (`model_type`, `dim`, `in_dim`) in its
# config.json. A14B has a config.json in the folder of each expert.
REPOSITORIES: dict[str, tuple[str, tuple[str, int, int]]] = {
    "Wan2.1-T2V-1.3B": ("Wan2.1-T2V-1.3B-Diffusers", ("t2v", 1536, 16)),
    "Wan2.1-T2V-14B": ("Wan2.1-T2V-14B-Diffusers", ("t2v", 5120, 16)),
    "Wan2.1-I2V-14B-480P": ("Wan2.1-I2V-14B-480P-Diffusers", ("i2v", 5120, 36)),
    "Wan2.1-I2V-14B-720P": ("Wan2.1-I2V-14B-720P-Diffusers", ("i2v", 5120, 36)),
    "Wan2.1-FLF2V-14B-720P": ("Wan2.1-FLF2V-14B-720P-diffusers", ("flf2v", 5120, 36)),
    "Wan2.2-T2V-A14B": ("Wan2.2-T2V-A14B-Diffusers", ("t2v", 5120, 16)),
    "Wan2.2-I2V-A14B": ("Wan2.2-I2V-A14B-Diffusers", ("i2v", 5120, 36)),
    "Wan2.2-TI2V-5B": ("Wan2.2-TI2V-5B-Diffusers", ("ti2v", 3072, 48)),
}
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
# Folders of the two experts of A14B.
EXPERTS = ("high_noise_model", "low_noise_model")


def check_not_native(name: str, source: str) -> None:
    """
    Refuse a pipeline in Wan's native format, as a folder or by the name of its repository.

    Args:
        name (`str`):
            Name of the option.
        source (`str`):
            Its value, a folder or Hub id.

    Raises:
        ValueError: If it is native. The message names the repository in diffusers' format.
    """
    folder = Path(source)
    if not folder.is_dir():
        owner, _, repository = source.rpartition("/")
        known = {native.lower(): diffusers for native, (diffusers, _) in REPOSITORIES.items()}
        if owner.lower() == "wan-ai" and repository.lower() in known:
            raise ValueError(
                f"`{name}`: '{source}' has Wan's native files. Give the same model in diffusers' format: "
                f"Wan-AI/{known[repository.lower()]}."
            )
        return
    if (folder / "model_index.json").exists():
        return
    configs = [folder / each / "config.json" for each in ("", *EXPERTS) if (folder / each / "config.json").is_file()]
    entries = [_read_entries(path) for path in configs]
    is_native = any("model_type" in each and "dim" in each for each in entries)
    if not is_native and not any(folder.glob("Wan2.*_VAE.pth")) and not (folder / TEXT_ENCODER).exists():
        return
    fitting = " or ".join(f"Wan-AI/{each}" for each in _fitting(folder, entries))
    same = (
        f"Give the same model in diffusers' format: {fitting}." if fitting else "Give a pipeline in diffusers' format."
    )
    raise ValueError(
        f"`{name}`: '{source}' has Wan's native files. {same} If its transformer is your own, `hy-prfl convert "
        "--transformer` converts it for `--transformer_path`."
    )


def _fitting(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Published models of this kind and size, in diffusers' format. Only one if the path contains its name."""
    has_experts = any((folder / each).is_dir() for each in EXPERTS)
    found = [(each.get("model_type"), each.get("dim"), each.get("in_dim")) for each in entries]
    fitting = {
        native: diffusers
        for native, (diffusers, size) in REPOSITORIES.items()
        if all(size == each for each in found) and (not found or has_experts == native.endswith("-A14B"))
    }
    named = [
        diffusers
        for native, diffusers in fitting.items()
        if re.search(
            rf"(?<![\w.]){re.escape(native)}(?![\w.])", str(folder.resolve()).replace("--", "/"), re.IGNORECASE
        )
    ]
    return named or (list(fitting.values()) if found else [])


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return entries if isinstance(entries, dict) else {}
