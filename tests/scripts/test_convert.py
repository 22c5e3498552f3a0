import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from hy_prfl.models.loading import load_reward_model
from hy_prfl.scripts.convert import main


GOLDEN = Path(__file__).parents[1] / "golden" / "t2v"
REWARD_PARTS = {
    "reward_transformer": GOLDEN / "reward" / "checkpoint-100",
    "mlp": GOLDEN / "reward" / "mlp_step_100.ckpt",
    "query_attention": GOLDEN / "reward" / "query_attention_step_100.ckpt",
}


def options(**values: object) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def test_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(options(**REWARD_PARTS, output_dir=tmp_path / "reward"))
    reward_model = load_reward_model(str(tmp_path / "reward"))
    native = load_file(REWARD_PARTS["reward_transformer"] / "diffusion_pytorch_model.safetensors")
    num_layers = len({name.split(".")[1] for name in native if name.startswith("blocks.")})
    assert (reward_model.config.num_layers, reward_model.config.base_num_layers) == (num_layers, 4)
    assert torch.equal(reward_model.blocks[0].attn1.to_q.weight, native["blocks.0.self_attn.q.weight"])
    mlp = torch.load(REWARD_PARTS["mlp"], weights_only=True)
    assert torch.equal(reward_model.head.linear_3.weight, mlp["fc3.weight"])
    assert f"Reward model with {num_layers} of 4 blocks" in capsys.readouterr().out


def test_generator(tmp_path: Path) -> None:
    main(options(transformer=GOLDEN, output_dir=tmp_path / "transformer"))
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    native = load_file(GOLDEN / "diffusion_pytorch_model.safetensors")
    assert torch.equal(transformer.proj_out.weight, native["head.head.weight"])
    assert transformer.config.num_layers == 4


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hy_prfl.scripts.convert"]
    subprocess.run([*command, *options(**REWARD_PARTS, output_dir=tmp_path / "reward")], check=True, timeout=120)
    load_reward_model(str(tmp_path / "reward"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Give `transformer`, or `reward_transformer`"),
        ({"mlp": "a"}, "`reward_transformer` must be given together with `mlp`"),
        ({"reward_transformer": "a", "mlp": "b"}, "`query_attention` must be given together"),
        ({"transformer": "a", "mlp": "b"}, "`mlp` must be left out with `transformer`"),
        ({**REWARD_PARTS, "num_query_heads": 0}, "`num_query_heads` must be at least 1"),
        ({**REWARD_PARTS, "task": "beauty"}, "task"),
    ],
)
def test_options(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(options(**values, output_dir=tmp_path / "out"))


def test_output_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="output_dir"):
        main(options(transformer=GOLDEN, output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.launch
def test_accelerate_launch(tmp_path: Path, accelerate_launch: Callable[..., str]) -> None:
    output = accelerate_launch("convert", *options(**REWARD_PARTS, output_dir=tmp_path / "reward"))
    assert "Reward model with" in output
    load_reward_model(str(tmp_path / "reward"))
