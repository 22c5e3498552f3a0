"""Upstream's recipes as its users convert them, and the commands that are printed, run as they are."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from diffusers import WanTransformer3DModel

from hy_prfl.data.schema import table_to_rows, unpack_tensor
from hy_prfl.models.conversion import save_native, save_reward_parts
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts.convert_recipe import main
from tests.formats.upstream_recipes import RECIPES, upstream_recipe


ROOT = Path(__file__).parents[2]
# What makes a recipe one for two processors and a pipeline of three blocks.
TINY: dict[str, Any] = {
    "lrm.trainable_blocks": [0, 1],
    "lrm.feature_layer": [2],
    "dataset.sp_size": 1,
    "dataset.num_workers": 0,
    "optimizer.max_train_steps": 1,
    "train.gradient_accumulation_steps": 1.0,
}


def write_clips(root: Path, names: Sequence[str], **fields: Any) -> list[str]:
    """Clips as upstream's preprocessing leaves them below `root`; returns the paths of their meta files."""
    paths = []
    for index, name in enumerate(names):
        rng = np.random.default_rng(len(name) + index)
        meta: dict[str, Any] = {"source_id": name, "short_caption": "a red circle", "long_caption": "a circle moves"}
        sizes = {
            "vae_latent_path": (1, 16, 3, 4, 6),
            "f1_black_path": (1, 16, 3, 4, 6),
            "imgclip_path": (1, 5, 32),
            "textshort_path": (1, 3, 32),
            "textlong_path": (1, 4, 32),
        }
        for field, size in sizes.items():
            meta[field] = f"clips/latents/{name}_{field}.npy"
            (root / "clips" / "latents").mkdir(parents=True, exist_ok=True)
            np.save(root / meta[field], rng.normal(size=size).astype(np.float32))
        path = Path("clips") / "meta_v1" / f"{name}_meta_v1.json"
        (root / path.parent).mkdir(exist_ok=True)
        (root / path).write_text(json.dumps(meta | fields))
        paths.append(str(path))
    return paths


def write_list(path: Path, lines: Sequence[str]) -> None:
    """A list file as upstream's are: without a newline at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


class Workplace:
    """A folder to run commands in, beside one that upstream ran in."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.upstream = folder / "HY-Video-PRFL"
        self.folder = folder / "work"
        self.folder.mkdir()
        self.capsys = capsys
        for name in ("accelerate_configs", "ds_configs"):
            shutil.copytree(ROOT / name, self.folder / name)
        # Eight GPUs, a whole copy on each, become one process on the CPU.
        shutil.copy(ROOT / "accelerate_configs" / "cpu.yaml", self.folder / "accelerate_configs" / "ddp.yaml")

    def convert(self, name: str, pipeline: Path, changes: Mapping[str, Any]) -> list[str]:
        """Convert a recipe, and return the commands that are printed."""
        source = self.upstream / "configs" / f"{name}.yaml"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(
            yaml.safe_dump(upstream_recipe(name, changes if name.startswith("pre_") else {**TINY, **changes}))
        )
        main(
            [
                f"--config={os.path.relpath(source)}",
                f"--output={name}.yaml",
                f"--pretrained_model_name_or_path={os.path.relpath(pipeline)}",
            ]
        )
        printed = self.capsys.readouterr().out
        assert "docs/upstream.md" in printed
        _, _, tail = printed.partition("Run in this folder, in this order:\n")
        commands = [line.strip() for line in tail.splitlines()]
        written = (self.folder / f"{name}.yaml").read_text()
        assert all(f"#   {command}\n" in written for command in commands)
        plan = re.search(r"Estimate memory and time before you start:\n  (.*)\n", printed)
        return [*([plan[1]] if plan else []), *commands]

    def run(self, commands: Sequence[str]) -> str:
        """Run commands in a shell, up to the first that fails; what they print."""
        script = "\n".join(["set -e", *commands])
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env=environment, text=True, capture_output=True, timeout=400
        )
        if finished.returncode:
            raise RuntimeError(f"{finished.stdout}\n{finished.stderr}")
        return finished.stdout + finished.stderr


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Workplace:
    place = Workplace(tmp_path, capsys)
    monkeypatch.chdir(place.folder)
    return place


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_converts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(upstream_recipe(name)))
    (tmp_path / "old.yaml").rename(tmp_path / f"{name}.yaml")
    main([f"--config={tmp_path / name}.yaml", f"--output={tmp_path / 'new.yaml'}"])
    assert f"options: {tmp_path / 'new.yaml'}" in capsys.readouterr().out


@pytest.mark.launch
def test_reward_model_then_generator_then_scores(workplace: Workplace, i2v_pipeline_dir: Path) -> None:
    """Upstream's three steps, each as its converted recipe says; the second and third find what the first has left."""
    up = workplace.upstream
    good = write_clips(up, ["a", "b"], physics_quality=1, human_quality="good")
    poor = write_clips(up, ["c", "d"], physics_quality=0, human_quality="poor")
    write_list(up / "train" / "meta.list", [*good, *poor])
    write_list(up / "val" / "meta.list", [good[0], poor[0]])
    (up / "temp_data" / "null" / "wanx").mkdir(parents=True)
    null_prompt = np.full((1, 2, 32), 0.25, np.float32)
    np.save(up / "temp_data" / "null" / "wanx" / "null.npy", null_prompt)
    lists = {"dataset.meta_file_list": ["train/meta.list"], "dataset.val_meta_file_list": ["val/meta.list"]}
    on_one = {"model.fsdp.fsdp_sharding_startegy": "none"}

    commands = workplace.convert("train_pavrm_i2v_480", i2v_pipeline_dir, lists | on_one)
    assert len(commands) == 4
    output = workplace.run(commands)
    assert "memory of a GPU" in output
    data = workplace.folder / "data" / "i2v-14b-480p"
    assert load_from_disk(data / "train" / "meta")["id"] == ["a", "b", "c", "d"]
    assert load_from_disk(data / "val" / "meta")["id"] == ["a", "c"]
    row = table_to_rows(load_from_disk(data / "train" / "meta").data.table)[0]
    np.testing.assert_array_equal(unpack_tensor(row, "null_prompt_embeds"), null_prompt[0])
    run = workplace.folder / "outputs" / "pavrm_i2v_480"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 1
    assert (run / "best" / "config.json").is_file()

    del lists["dataset.val_meta_file_list"]
    output = workplace.run(workplace.convert("train_prfl_i2v_480", i2v_pipeline_dir, lists | on_one))
    assert "is complete, nothing to do" in output
    assert (workplace.folder / "outputs" / "prfl_i2v_480" / "transformer" / "config.json").is_file()

    validation = {"dataset.val_meta_file_list": ["val/meta.list"], "train_id": "pavrm_i2v_480", "task": "i2v-14b-480p"}
    validation |= {"model.base_path": "weights/Wan2.1-I2V-14B-480P"}
    workplace.run(workplace.convert("infer_pavrm_i2v_720", i2v_pipeline_dir, validation))
    table = (workplace.folder / "outputs" / "pavrm_i2v_480" / "scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["id", "a", "c"]


@pytest.mark.launch
def test_pairs_from_two_lists(workplace: Workplace, pipeline_dir: Path) -> None:
    """Labels come from the lists, whatever the meta files say."""
    up = workplace.upstream
    better = write_clips(up, ["a", "b"], physics_quality=0)
    worse = write_clips(up, ["c", "d", "e"])
    write_list(up / "lists" / "win.list", better)
    write_list(up / "lists" / "lose.list", [*worse, ""])
    names = {"": "win", "_lose": "lose"}
    lists: dict[str, Any] = {f"dataset.meta_file{part}_list": [f"lists/{name}.list"] for part, name in names.items()}
    lists |= {"dataset.val_meta_file_list": ..., "model.fsdp.fsdp_sharding_startegy": "none"}
    lists |= {"task": "t2v-14b", "model.base_path": "weights/Wan2.1-T2V-14B"}
    commands = workplace.convert("train_pavrm_bt_i2v_720", pipeline_dir, lists)
    workplace.run(commands[1:])
    (path,) = re.findall(r"^train_dataset: (\S+)", Path("train_pavrm_bt_i2v_720.yaml").read_text(), re.MULTILINE)
    rows = load_from_disk(workplace.folder / path)
    assert rows["id"] == ["a", "b", "c", "d", "e"]
    assert rows["physics_quality"] == rows["human_quality"] == [1, 1, 0, 0, 0]
    assert (workplace.folder / "outputs" / "pavrm_bt_i2v_720" / "reward_model").is_dir()

    # A clip that is in both lists is neither.
    write_list(up / "lists" / "lose.list", [*worse, better[0]])
    (workplace.folder / "train_pavrm_bt_i2v_720.yaml").unlink()
    with pytest.raises(RuntimeError, match="already"):
        workplace.run(workplace.convert("train_pavrm_bt_i2v_720", pipeline_dir, lists)[1:])


@pytest.mark.launch
def test_checkpoints_to_start_from(workplace: Workplace, pipeline_dir: Path) -> None:
    """A generator and a reward model in upstream's format, both of which training starts from."""
    up = workplace.upstream
    write_list(up / "lists" / "clips_480.list", write_clips(up, ["a", "b"]))
    generator = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    save_native(generator, up / "run" / "generator-7", text_len=16)
    reward_model = WanRewardModel.from_transformer(generator, num_layers=2)
    save_reward_parts(reward_model, up / "reward")
    changes = {
        "model.lrm_transformer_path": "reward/checkpoint-0",
        "model.lrm_mlp_path": "reward/mlp_step_0.ckpt",
        "model.lrm_query_attention_path": "reward/query_attention_step_0.ckpt",
        "model.resume_transformer_path": "run/generator-7",
        "model.fsdp.fsdp_sharding_startegy": "none",
        "lrm.task": "blur_quality",
    }
    workplace.run(workplace.convert("train_prfl_t2v_480", pipeline_dir, changes))
    made = workplace.folder / "converted" / "train_prfl_t2v_480"
    reward = WanRewardModel.from_pretrained(made / "reward_model")
    assert reward.config.task == "blur_quality"
    assert all((value == reward_model.state_dict()[name]).all() for name, value in reward.state_dict().items())
    options = yaml.safe_load((workplace.folder / "outputs" / "prfl_t2v_480" / "config.yaml").read_text())
    assert Path(options["transformer_path"]).resolve() == (up / "run" / "generator-7").resolve()
    assert (workplace.folder / "outputs" / "prfl_t2v_480" / "transformer" / "config.json").is_file()


@pytest.mark.launch
def test_preprocessing(workplace: Workplace, i2v_pipeline_dir: Path, write_video: Callable[..., Path]) -> None:
    """Beside upstream's own results; video paths are relative to the folder that upstream ran in."""
    up = workplace.upstream
    write_clips(up, ["a"])
    write_video(up / "videos" / "a.mp4")
    row = {"source_id": "a", "short_caption": "a", "long_caption": "b", "video_path": "videos/a.mp4"}
    (up / "input.json").write_text(json.dumps([row]))
    changes = {"json_path": "input.json", "save_dir": "clips", "resolution": [32], "num_frames": 9}
    workplace.run(workplace.convert("pre_480", i2v_pipeline_dir, changes))
    rows = load_from_disk(workplace.folder / "data" / "i2v-14b-480p" / "clips")
    assert (rows["id"], rows["height"], rows["width"], rows["num_frames"]) == (["a"], [32], [64], [9])


@pytest.mark.launch
def test_the_launch_files_are_linked(workplace: Workplace, pipeline_dir: Path) -> None:
    for name in ("accelerate_configs", "ds_configs"):
        shutil.rmtree(workplace.folder / name)
    for name in ("train_pavrm_t2v_480", "train_prfl_t2v_480"):
        link = workplace.convert(name, pipeline_dir, {})[1]
        workplace.run([link, link])
        assert (workplace.folder / "accelerate_configs" / "zero3.yaml").is_file()
        assert (workplace.folder / "ds_configs" / "zero3.json").is_file()
        for folder in ("accelerate_configs", "ds_configs"):
            (workplace.folder / folder).unlink()
