"""Folders laid out as Wan's native repositories are, with the entries of their config.json."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hy_prfl.configs.native import REPOSITORIES, check_not_native
from hy_prfl.formats.pipeline_info import BOUNDARY_RATIOS, PUBLISHED
from hy_prfl.scripts import generate, plan, preprocess, score, train_prfl, train_reward


# config.json of Wan-AI/Wan2.1-I2V-14B-720P.
I2V_ENTRIES: dict[str, Any] = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 5120,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_dim": 36,
    "model_type": "i2v",
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
}
T2V_ENTRIES = I2V_ENTRIES | {"model_type": "t2v", "in_dim": 16}


def write_native(folder: Path, entries: dict[str, Any] | None, *, experts: bool = False) -> Path:
    folders = [folder / "high_noise_model", folder / "low_noise_model"] if experts else [folder]
    for each in folders:
        each.mkdir(parents=True)
        if entries is not None:
            (each / "config.json").write_text(json.dumps(entries))
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"):
        (folder / name).touch()
    return folder


def test_the_table_has_the_published_pipelines() -> None:
    assert {f"Wan-AI/{diffusers}" for diffusers, _ in REPOSITORIES.values()} == set(PUBLISHED)
    for native, (diffusers, (model_type, dim, in_dim)) in REPOSITORIES.items():
        config = PUBLISHED[f"Wan-AI/{diffusers}"]
        assert (dim, in_dim) == (config["num_attention_heads"] * 128, config.get("in_channels", 16))
        assert model_type == native.split("-")[1].lower()
        assert native.endswith("-A14B") == (f"Wan-AI/{diffusers}" in BOUNDARY_RATIOS)


@pytest.mark.parametrize(
    ("name", "entries", "experts", "expected"),
    [
        ("Wan2.1-I2V-14B-720P", I2V_ENTRIES, False, "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers."),
        (
            "weights",
            I2V_ENTRIES,
            False,
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers or Wan-AI/Wan2.1-I2V-14B-720P-Diffusers.",
        ),
        ("weights", T2V_ENTRIES | {"dim": 1536}, False, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."),
        ("weights", T2V_ENTRIES, False, "Wan-AI/Wan2.1-T2V-14B-Diffusers."),
        ("weights", T2V_ENTRIES, True, "Wan-AI/Wan2.2-T2V-A14B-Diffusers."),
        ("weights", I2V_ENTRIES, True, "Wan-AI/Wan2.2-I2V-A14B-Diffusers."),
        ("weights", I2V_ENTRIES | {"model_type": "flf2v"}, False, "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers."),
        (
            "weights",
            I2V_ENTRIES | {"model_type": "ti2v", "dim": 3072, "in_dim": 48},
            False,
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers.",
        ),
        # The name of a folder does not overrule what is in it.
        ("Wan2.1-T2V-14B", I2V_ENTRIES | {"model_type": "flf2v"}, False, "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers."),
        # The text encoder and the VAE alone, as where the weights are still on their way.
        ("Wan2.1-T2V-14B", None, False, "Wan-AI/Wan2.1-T2V-14B-Diffusers."),
        ("models--Wan-AI--Wan2.2-T2V-A14B/snapshots/1", None, True, "Wan-AI/Wan2.2-T2V-A14B-Diffusers."),
        ("weights", None, False, "Give a pipeline in diffusers' format."),
        ("weights", T2V_ENTRIES | {"dim": 64}, False, "Give a pipeline in diffusers' format."),
    ],
)
def test_native_folders(
    tmp_path: Path, name: str, entries: dict[str, Any] | None, experts: bool, expected: str
) -> None:
    folder = write_native(tmp_path / name, entries, experts=experts)
    with pytest.raises(ValueError, match="has Wan's native files") as caught:
        check_not_native("pretrained_model_name_or_path", str(folder))
    assert f"'{folder}'" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("native", sorted(REPOSITORIES))
def test_names_on_the_hub(native: str) -> None:
    with pytest.raises(ValueError, match=f": Wan-AI/{REPOSITORIES[native][0]}\\.$"):
        check_not_native("pretrained_model_name_or_path", f"Wan-AI/{native}")
    check_not_native("pretrained_model_name_or_path", f"Wan-AI/{REPOSITORIES[native][0]}")
    check_not_native("pretrained_model_name_or_path", f"somebody/{native}")


def test_what_is_not_native(tmp_path: Path, pipeline_dir: Path) -> None:
    check_not_native("pretrained_model_name_or_path", str(pipeline_dir))
    # One transformer of diffusers is no pipeline, but not native either.
    check_not_native("pretrained_model_name_or_path", str(pipeline_dir / "transformer"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        check_not_native("pretrained_model_name_or_path", str(tmp_path))


RECIPE = ["--output_dir=out", "--train_dataset=data"]
COMMANDS: list[tuple[Callable[[Sequence[str]], None], list[str]]] = [
    (preprocess.main, ["--output_dir=out", "--manifest={file}"]),
    (train_reward.main, RECIPE),
    (train_prfl.main, [*RECIPE, "--reward_model=reward"]),
    (generate.main, ["--output_dir=out", "--prompts={file}"]),
    (score.main, ["--output=scores.csv", "--reward_model=reward", "--manifest={file}"]),
    (plan.main, ["--config={recipe}", "--gpu_memory=80"]),
]


@pytest.mark.parametrize(("main", "options"), COMMANDS, ids=[main.__module__ for main, _ in COMMANDS])
def test_every_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[Sequence[str]], None], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("[]")
    (tmp_path / "recipe.yaml").write_text("reward_model: r\nreward_loss: logit\n")
    folder = write_native(tmp_path / "Wan2.1-I2V-14B-720P", I2V_ENTRIES)
    words = [word.format(file=tmp_path / "file.json", recipe=tmp_path / "recipe.yaml") for word in options]
    with pytest.raises(ValueError, match="native files.*Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"):
        main([*words, f"--pretrained_model_name_or_path={folder}"])
    assert not (tmp_path / "out").exists()
