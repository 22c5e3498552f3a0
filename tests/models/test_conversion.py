"""Conversion of native checkpoints that are made here by renaming a diffusers model's weights backwards."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from hy_prfl.models.conversion import (
    convert_reward_model,
    convert_transformer,
    rename_mlp_keys,
    rename_query_attention_keys,
    save_converted,
)
from hy_prfl.models.loading import load_reward_model
from hy_prfl.models.reward_model import WanRewardModel


DIM = 24
CONFIG = {
    "model_type": "t2v",
    "text_len": 16,
    "in_dim": 16,
    "dim": DIM,
    "ffn_dim": 32,
    "freq_dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 3,
    "eps": 1e-06,
}

# diffusers' name -> Wan's, by hand and in this direction, so that diffusers' own converter is tested as well.
RENAMES = [
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table$", "modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_k_proj\.", ".k_img."),
    (r"\.add_v_proj\.", ".v_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
]


def native_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def make_transformer(image_to_video: bool = False, **options: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if image_to_video else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=3,
        image_dim=40 if image_to_video else None,
        added_kv_proj_dim=DIM if image_to_video else None,
        **options,
    )


def native_weights(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    return {native_name(name): tensor.clone() for name, tensor in transformer.state_dict().items()}


def write_native(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    return make_transformer()


@pytest.fixture
def weights(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    return native_weights(transformer)


def assert_equal_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    state_dict = model.state_dict()
    assert set(state_dict) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state_dict[name], tensor), name


class TestTransformer:
    def test_text_to_video(
        self, tmp_path: Path, transformer: WanTransformer3DModel, weights: dict[str, torch.Tensor]
    ) -> None:
        converted = convert_transformer(write_native(tmp_path / "native", weights))
        assert_equal_weights(converted, transformer)
        for name, value in transformer.config.items():
            if not name.startswith("_"):
                assert converted.config[name] == value, name

    @pytest.mark.parametrize("options", [{}, {"pos_embed_seq_len": 10}])
    def test_image_to_video(self, tmp_path: Path, options: dict[str, Any]) -> None:
        transformer = make_transformer(image_to_video=True, **options)
        folder = write_native(tmp_path / "native", native_weights(transformer), model_type="i2v", in_dim=36)
        converted = convert_transformer(folder)
        assert_equal_weights(converted, transformer)
        assert converted.config.image_dim == 40
        assert converted.config.pos_embed_seq_len == options.get("pos_embed_seq_len")

    def test_round_trip_keeps_types(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        half = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        converted = convert_transformer(write_native(tmp_path / "native", half))
        save_converted(converted, tmp_path / "out")
        loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor.float(), half[native_name(name)].float()), name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "out"]

    def test_rope_is_not_left_empty(
        self, tmp_path: Path, transformer: WanTransformer3DModel, weights: dict[str, torch.Tensor]
    ) -> None:
        converted = convert_transformer(write_native(tmp_path / "native", weights))
        inputs = {
            "hidden_states": torch.randn(1, 16, 2, 4, 4),
            "timestep": torch.tensor([300.0]),
            "encoder_hidden_states": torch.randn(1, 5, 32),
        }
        with torch.no_grad():
            assert torch.equal(converted(**inputs).sample, transformer.eval()(**inputs).sample)

    def test_shards(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], transformer: WanTransformer3DModel
    ) -> None:
        folder = tmp_path / "native"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        names = sorted(weights)
        weight_map = {}
        for index in range(3):
            shard = f"diffusion_pytorch_model-0000{index + 1}-of-00003.safetensors"
            save_file({name: weights[name] for name in names[index::3]}, folder / shard)
            weight_map |= dict.fromkeys(names[index::3], shard)
        index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert_equal_weights(convert_transformer(folder), transformer)

        missing = {**weight_map, "blocks.9.x": "diffusion_pytorch_model-00001-of-00003.safetensors"}
        index_file.write_text(json.dumps({"weight_map": missing}))
        with pytest.raises(ValueError, match=r"1 missing \(blocks\.9\.x\)"):
            convert_transformer(folder)
        index_file.write_text(json.dumps({"weight_map": weight_map}))
        (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="00002-of-00003"):
            convert_transformer(folder)

    def test_missing_and_unexpected_keys(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        less = dict(weights)
        del less["blocks.1.ffn.2.bias"]
        with pytest.raises(ValueError, match=r"1 missing \(blocks\.1\.ffn\.net\.2\.bias\)"):
            convert_transformer(write_native(tmp_path / "less", less))
        more = {**weights, "blocks.0.extra.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"1 unexpected \(blocks\.0\.extra\.weight\)"):
            convert_transformer(write_native(tmp_path / "more", more))

    def test_shape(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        weights["blocks.2.self_attn.q.weight"] = torch.zeros(DIM, DIM + 1)
        with pytest.raises(ValueError, match=r"'blocks\.2\.attn1\.to_q\.weight' must have the shape \(24, 24\)"):
            convert_transformer(write_native(tmp_path / "native", weights))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"num_layers": 4}, r"counts 4 blocks \(`num_layers`\), the weights have 3"),
            ({"num_layers": 2}, r"counts 2 blocks \(`num_layers`\), the weights have 3"),
            ({"dim": 48}, "`dim` 48, the weights have 24"),
            ({"in_dim": 36}, "`in_dim` 36, the weights have 16"),
            ({"ffn_dim": 64}, "`ffn_dim` 64, the weights have 32"),
            ({"out_dim": 48}, "`out_dim` 48, the weights have 16"),
            ({"num_heads": 5}, "`num_heads` 5 does not divide `dim` 24"),
            ({"qk_norm": False}, "`qk_norm` must be True"),
            ({"model_type": "vace"}, "`model_type` must be one of"),
            ({"vace_layers": 3}, "unknown entries vace_layers"),
            ({"_class_name": "WanTransformer3DModel"}, "a diffusers model already"),
        ],
    )
    def test_config(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            convert_transformer(write_native(tmp_path / "native", weights, **config))

    def test_files(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            convert_transformer(tmp_path / "none")
        folder = write_native(tmp_path / "native", weights)
        (folder / "diffusion_pytorch_model.safetensors").rename(folder / "a.safetensors")
        save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
        with pytest.raises(ValueError, match="2 safetensors files"):
            convert_transformer(folder)
        (folder / "b.safetensors").unlink()
        convert_transformer(folder)
        (folder / "a.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="no safetensors file"):
            convert_transformer(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            convert_transformer(folder)


class RewardParts:
    """Upstream's three files, and the model that they must become."""

    def __init__(self, folder: Path, transformer: WanTransformer3DModel, num_layers: int = 2) -> None:
        torch.manual_seed(1)
        self.attention = torch.nn.MultiheadAttention(DIM, 8, batch_first=True)
        torch.nn.init.normal_(self.attention.in_proj_bias)
        torch.nn.init.normal_(self.attention.out_proj.bias)
        self.query = torch.randn(1, DIM)
        layers = {"fc1": torch.nn.Linear(DIM, 20), "fc2": torch.nn.Linear(20, 10), "fc3": torch.nn.Linear(10, 1)}
        self.mlp = torch.nn.ModuleDict(layers)

        kept = re.compile(rf"^(head\.|blocks\.([{num_layers}-9]|\d\d)\.)")
        weights = {name: tensor for name, tensor in native_weights(transformer).items() if not kept.match(name)}
        self.transformer = write_native(folder / "checkpoint-100", weights)
        self.mlp_file = folder / "mlp_step_100.ckpt"
        torch.save(self.mlp.state_dict(), self.mlp_file)
        self.query_file = folder / "query_attention_step_100.ckpt"
        state_dict = {f"multihead_attn.{name}": tensor for name, tensor in self.attention.state_dict().items()}
        torch.save({"queries": self.query, **state_dict}, self.query_file)

    def convert(self, **options: Any) -> WanRewardModel:
        return convert_reward_model(self.transformer, self.mlp_file, self.query_file, **options)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Upstream's pooling and MLP, of torch's own modules."""
        query = self.query.expand(len(features), 1, DIM)
        pooled = (self.attention(query, features, features)[0] + query)[:, 0]
        hidden = torch.relu(self.mlp["fc2"](torch.relu(self.mlp["fc1"](pooled))))
        return self.mlp["fc3"](hidden)[:, 0]


@pytest.fixture
def parts(tmp_path: Path, transformer: WanTransformer3DModel) -> RewardParts:
    return RewardParts(tmp_path / "parts", transformer)


class TestRewardModel:
    INPUTS = {
        "hidden_states": torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)),
    }

    @torch.no_grad()
    def test_scores(self, parts: RewardParts, transformer: WanTransformer3DModel) -> None:
        reward_model = parts.convert(task="physics_quality")
        config = reward_model.config
        assert (config.num_layers, config.base_num_layers, config.num_query_heads) == (2, 3, 8)
        assert (config.query_residual, tuple(config.head_dims), config.task) == (True, (20, 10), "physics_quality")
        for name, tensor in reward_model.blocks.state_dict().items():
            assert torch.equal(tensor, transformer.blocks.state_dict()[name]), name
        output = reward_model(**self.INPUTS)
        torch.testing.assert_close(output.logits, parts.logits(output.features), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_round_trip(self, parts: RewardParts, tmp_path: Path) -> None:
        reward_model = parts.convert()
        save_converted(reward_model, tmp_path / "out")
        loaded = load_reward_model(str(tmp_path / "out"))
        assert_equal_weights(loaded, reward_model)
        # Not bit for bit: weights that are mapped from a file are aligned in another way, which changes the kernels.
        torch.testing.assert_close(loaded(**self.INPUTS).logits, reward_model(**self.INPUTS).logits)

    @torch.no_grad()
    def test_options_that_no_file_tells(self, parts: RewardParts) -> None:
        logits = parts.convert()(**self.INPUTS).logits
        assert not torch.allclose(parts.convert(query_residual=False)(**self.INPUTS).logits, logits)
        assert not torch.allclose(parts.convert(num_query_heads=2)(**self.INPUTS).logits, logits)
        with pytest.raises(ValueError, match="num_query_heads"):
            parts.convert(num_query_heads=7)

    def test_too_many_blocks(self, parts: RewardParts) -> None:
        (parts.transformer / "config.json").write_text(json.dumps({**CONFIG, "num_layers": 1}))
        with pytest.raises(ValueError, match="2 blocks, more than the 1"):
            parts.convert()

    def test_generator_with_its_head_is_refused(self, parts: RewardParts, weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, parts.transformer / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=r"unexpected \(proj_out\.bias, proj_out\.weight, scale_shift_table\)"):
            parts.convert()

    def test_mlp_of_another_width(self, parts: RewardParts) -> None:
        state_dict = {**parts.mlp.state_dict(), "fc1.weight": torch.zeros(20, DIM + 1)}
        torch.save(state_dict, parts.mlp_file)
        with pytest.raises(ValueError, match=r"'head\.linear_1\.weight' must have the shape \(20, 24\)"):
            parts.convert()

    def test_swapped_files(self, parts: RewardParts) -> None:
        with pytest.raises(
            ValueError, match=r"query_attention_step_100\.ckpt: keys do not fit: 6 missing \(fc1\.bias"
        ):
            convert_reward_model(parts.transformer, parts.query_file, parts.mlp_file)

    def test_files(self, parts: RewardParts) -> None:
        parts.mlp_file.rename(parts.mlp_file.with_name("x"))
        with pytest.raises(FileNotFoundError, match="mlp_step_100"):
            parts.convert()
        torch.save([1, 2], parts.mlp_file)
        with pytest.raises(ValueError, match="expected a state dict"):
            parts.convert()


class TestRenameKeys:
    def test_mlp(self) -> None:
        state_dict = {f"fc{layer}.{part}": torch.zeros(1) for layer in (1, 2, 3) for part in ("weight", "bias")}
        renamed = rename_mlp_keys(state_dict, source="a.ckpt")
        assert set(renamed) == {f"head.linear_{layer}.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")}
        del state_dict["fc2.bias"]
        with pytest.raises(ValueError, match=r"a\.ckpt: keys do not fit: 1 missing \(fc2\.bias\)\."):
            rename_mlp_keys({**state_dict}, source="a.ckpt")
        with pytest.raises(ValueError, match=r"1 missing \(fc2\.bias\) and 1 unexpected \(fc4\.bias\)"):
            rename_mlp_keys({**state_dict, "fc4.bias": torch.zeros(1)}, source="a.ckpt")

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("queries", (2, 8), "'queries' must be one query"),
            ("multihead_attn.in_proj_weight", (24, 9), r"must be \(24, 8\), got \(24, 9\)"),
            ("multihead_attn.in_proj_bias", (23,), r"must be \(24,\), got \(23,\)"),
        ],
    )
    def test_query_attention_of_another_shape(self, key: str, shape: tuple[int, ...], message: str) -> None:
        attention = torch.nn.MultiheadAttention(8, 2)
        state_dict = {f"multihead_attn.{name}": tensor for name, tensor in attention.state_dict().items()}
        state_dict |= {"queries": torch.zeros(1, 8), key: torch.zeros(shape)}
        with pytest.raises(ValueError, match=message):
            rename_query_attention_keys(state_dict, source="q.ckpt")


def test_output_folder_in_use(tmp_path: Path, transformer: WanTransformer3DModel) -> None:
    (tmp_path / "out").mkdir()
    save_converted(transformer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"`output_dir` .*out' exists"):
        save_converted(transformer, tmp_path / "out")
