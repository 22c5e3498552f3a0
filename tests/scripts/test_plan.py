import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.scripts.plan import main, separate_options
from tests.planning.recipes import prfl_recipe


ROOT = Path(__file__).parents[2]
RECIPE = "pretrained_model_name_or_path: {path}\nnum_inference_steps: 4\nupdate_schedule: alternate\n"
CLIP = ["--height", "32", "--width", "32", "--num_frames", "5"]


def test_plan_of_a_folder(pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(RECIPE.format(path=pipeline_dir))
    main(["--config", str(recipe), *CLIP, "--lora_rank=4", "--output", str(output), "--num_rows", "10"])
    shown = capsys.readouterr().out
    assert "train_prfl of" in shown
    assert "fits" in shown
    plan = json.loads(output.read_text())
    assert plan["num_trained"] < plan["num_parameters"]
    assert plan["num_tokens"] == 2 * 2 * 2
    assert plan["hours"] > 0
    assert prfl_recipe().lora_rank is None


def test_reward_model_on_disk_is_taken(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    for num_layers in (1, 2):
        model = WanRewardModel.from_transformer(transformer, num_layers=num_layers, num_query_heads=2)
        model.save_pretrained(tmp_path / f"reward-{num_layers}")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=pipeline_dir))
    sizes = []
    for num_layers in (1, 2):
        # A folder that is not there yet.
        output = tmp_path / f"plans-{num_layers}" / "plan.json"
        reward = f"--reward_model={tmp_path / f'reward-{num_layers}'}"
        main(["--config", str(recipe), *CLIP, reward, "--output", str(output)])
        sizes.append(json.loads(output.read_text())["memory"]["reward model"])
    assert sizes[0] < sizes[1]


def test_reward_models_on_disk_with_the_same_blocks_count_once(pipeline_dir: Path, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
    model = WanRewardModel.from_transformer(transformer, num_layers=2, num_query_heads=2)
    for name in ("probe-0", "probe-1"):
        model.reset_head()
        model.save_pretrained(tmp_path / name)
    with torch.no_grad():
        model.blocks[1].ffn.net[2].bias.add_(1.0)
    model.save_pretrained(tmp_path / "tuned")
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(RECIPE.format(path=pipeline_dir))
    needs = []
    for other in ("probe-1", "tuned"):
        models = [str(tmp_path / "probe-0"), str(tmp_path / other)]
        main(["--config", str(recipe), *CLIP, "--output", str(output), "--reward_models", *models])
        plan = json.loads(output.read_text())
        needs.append((plan["memory"]["reward model"], plan["teraflops"]["reward"]))
    heads = sum(each.nbytes for part in (model.pooler, model.head) for each in part.parameters())
    whole = sum(each.nbytes for each in model.parameters())
    assert needs[0][0] / needs[1][0] == pytest.approx((whole + heads) / (2 * whole), rel=0.01)
    assert needs[0][1] < 0.7 * needs[1][1]


def test_command_is_told_by_keys(pipeline_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"pretrained_model_name_or_path: {pipeline_dir}\nloss: bt\nnum_layers: 2\nnum_query_heads: 2\n")
    main(["--config", str(recipe), *CLIP])
    assert "train_reward of" in capsys.readouterr().out
    recipe.write_text(f"pretrained_model_name_or_path: {pipeline_dir}\nlearning_rate: 1e-5\n")
    with pytest.raises(ValueError, match="recipe_command"):
        main(["--config", str(recipe), *CLIP])
    main(["--config", str(recipe), *CLIP, "--recipe_command", "train_prfl"])
    assert "train_prfl of" in capsys.readouterr().out


def test_misspelt_option_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path="pipeline"))
    with pytest.raises(ValueError, match="lora_rnak"):
        main(["--config", str(recipe), "--lora_rnak", "4"])


def test_options_are_sorted() -> None:
    own, others = separate_options(
        ["--config", "a.yaml", "--step_range", "1", "2", "--num-gpus=4", "--lora_rank", "8"]
    )
    assert own == ["--recipe", "a.yaml", "--num-gpus=4"]
    assert others == ["--step_range", "1", "2", "--lora_rank", "8"]
