"""Conversion of whole models. Native checkpoints are made by renaming the weights of a diffusers model."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from hy_prfl.models.conversion import (
    convert_reward_model,
    convert_transformer,
    read_diffusers,
    read_transformer,
    rename_mlp_keys,
    rename_query_attention_keys,
    save_converted,
    save_native,
    save_reward_parts,
)
from hy_prfl.models.loading import load_reward_model
from hy_prfl.models.reward_model import WanRewardModel
from tests.formats.native_layout import (
    DIM,
    KINDS,
    assert_equal_weights,
    make_transformer,
    native_entries,
    native_weights,
    run,
    write_native,
)


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    return make_transformer()


@pytest.fixture
def weights(transformer: WanTransformer3DModel) -> dict[str, torch.Tensor]:
    return native_weights(transformer)


class TestReadTransformer:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_native(self, tmp_path: Path, kind: str) -> None:
        transformer = make_transformer(kind)
        converted = read_transformer(write_native(tmp_path / "native", native_weights(transformer), kind))
        assert_equal_weights(converted.state_dict(), transformer.state_dict())
        for name, value in transformer.config.items():
            if not name.startswith("_"):
                assert converted.config[name] == value, name
        # Not bit for bit: weights that are mapped from a file are aligned in another way, which changes the kernels.
        torch.testing.assert_close(run(converted), run(transformer))

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_diffusers(self, tmp_path: Path, kind: str) -> None:
        transformer = make_transformer(kind).to(torch.bfloat16)
        transformer.save_pretrained(tmp_path / "model")
        read = read_transformer(tmp_path / "model")
        # `from_pretrained` would cast some weights to float32.
        assert_equal_weights(read.state_dict(), transformer.state_dict())

    def test_types_survive(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        weights = {name: tensor if "norm" in name else tensor.to(torch.bfloat16) for name, tensor in weights.items()}
        converted = convert_transformer(write_native(tmp_path / "native", weights))
        assert_equal_weights(native_weights(converted), weights)

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
    def test_single_file(
        self,
        tmp_path: Path,
        weights: dict[str, torch.Tensor],
        transformer: WanTransformer3DModel,
        prefix: str,
        suffix: str,
    ) -> None:
        path = tmp_path / f"wan2.1_t2v{suffix}"
        weights = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
        if suffix == ".safetensors":
            save_file(weights, path)
        else:
            torch.save(weights, path)
        with pytest.raises(
            FileNotFoundError, match="number of heads cannot be read from the weights: give Wan's config.json as"
        ):
            read_transformer(path)
        config = tmp_path / "elsewhere" / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(native_entries()))
        assert_equal_weights(read_transformer(path, config).state_dict(), transformer.state_dict())
        config.rename(tmp_path / "config.json")
        assert_equal_weights(read_transformer(path).state_dict(), transformer.state_dict())

    def test_shards(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], transformer: WanTransformer3DModel
    ) -> None:
        folder = tmp_path / "native"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(native_entries()))
        names = sorted(weights)
        weight_map = {}
        for index in range(3):
            shard = f"diffusion_pytorch_model-0000{index + 1}-of-00003.safetensors"
            save_file({name: weights[name] for name in names[index::3]}, folder / shard)
            weight_map |= dict.fromkeys(names[index::3], shard)
        index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert_equal_weights(convert_transformer(folder).state_dict(), transformer.state_dict())

    def test_keys_are_named_as_in_the_file(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        less = dict(weights)
        del less["blocks.1.ffn.2.bias"]
        with pytest.raises(ValueError, match=r"less: keys do not fit: 1 missing \(blocks\.1\.ffn\.2\.bias\)"):
            convert_transformer(write_native(tmp_path / "less", less))
        more = {**weights, "blocks.0.extra.weight": torch.zeros(1), "scaled_fp8": torch.zeros(2)}
        with pytest.raises(ValueError, match=r"more: .*2 unexpected \(blocks\.0\.extra\.weight, scaled_fp8\)"):
            convert_transformer(write_native(tmp_path / "more", more))

    def test_shape(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        weights["blocks.2.self_attn.q.weight"] = torch.zeros(DIM, DIM + 1)
        with pytest.raises(ValueError, match=r"'blocks\.2\.self_attn\.q\.weight' must have the shape \(24, 24\)"):
            convert_transformer(write_native(tmp_path / "native", weights))

    @pytest.mark.parametrize("num_layers", [2, 4])
    def test_number_of_blocks(self, tmp_path: Path, weights: dict[str, torch.Tensor], num_layers: int) -> None:
        with pytest.raises(ValueError, match=rf"has `num_layers` {num_layers}, but the weights have 3 blocks"):
            convert_transformer(write_native(tmp_path / "native", weights, num_layers=num_layers))

    def test_diffusers_folders_that_do_not_fit(self, tmp_path: Path, transformer: WanTransformer3DModel) -> None:
        transformer.save_pretrained(tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        entries = json.loads(path.read_text())
        path.write_text(json.dumps({**entries, "quantization_config": {}}))
        with pytest.raises(ValueError, match=r"config\.json: unknown entries quantization_config"):
            read_transformer(tmp_path / "model")
        path.write_text(json.dumps({**entries, "num_layers": 2}))
        with pytest.raises(ValueError, match=r"model: keys do not fit: .* unexpected \(blocks\.2\."):
            read_transformer(tmp_path / "model")
        path.write_text(json.dumps({**entries, "_class_name": "WanRewardModel"}))
        with pytest.raises(ValueError, match="this is a reward model. Give it as `reward_model`"):
            read_transformer(tmp_path / "model")
        with pytest.raises(ValueError, match="`_class_name` must be WanTransformer3DModel, got 'WanRewardModel'"):
            read_diffusers(WanTransformer3DModel, tmp_path / "model")
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            read_transformer(tmp_path / "none")


class TestSaveNative:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    @pytest.mark.parametrize("max_shard_size", [None, "30KB"])
    def test_native_to_diffusers_and_back(self, tmp_path: Path, kind: str, max_shard_size: str | None) -> None:
        weights = {
            name: tensor if "norm" in name else tensor.to(torch.bfloat16)
            for name, tensor in native_weights(make_transformer(kind)).items()
        }
        native = write_native(tmp_path / "native", weights, kind)
        save_converted(read_transformer(native), tmp_path / "model", max_shard_size=max_shard_size)
        save_native(
            read_transformer(tmp_path / "model"), tmp_path / "back", text_len=16, max_shard_size=max_shard_size
        )
        if max_shard_size is None:
            assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", WEIGHTS_FILE]
        index_file = tmp_path / "back" / f"{WEIGHTS_FILE}.index.json"
        assert index_file.is_file() == (max_shard_size is not None)
        found = {
            key: tensor
            for path in (tmp_path / "back").glob("*.safetensors")
            for key, tensor in load_file(path).items()
        }
        assert_equal_weights(found, weights)
        entries = json.loads((tmp_path / "back" / "config.json").read_text())
        assert native_entries(kind).items() <= entries.items()
        assert entries["_class_name"] == "WanModel"

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_diffusers_to_native_and_back(self, tmp_path: Path, kind: str) -> None:
        transformer = make_transformer(kind).to(torch.float16)
        transformer.save_pretrained(tmp_path / "model")
        save_native(read_transformer(tmp_path / "model"), tmp_path / "native")
        save_converted(read_transformer(tmp_path / "native"), tmp_path / "back")
        assert_equal_weights(load_file(tmp_path / "back" / WEIGHTS_FILE), load_file(tmp_path / "model" / WEIGHTS_FILE))
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "back")]
        assert configs[0] == configs[1]

    def test_weights_that_native_code_has_no_name_for(
        self, tmp_path: Path, transformer: WanTransformer3DModel
    ) -> None:
        other = make_transformer()
        other.extra = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"out: keys do not fit: 2 unexpected \(extra\.bias, extra\.weight\)"):
            save_native(other, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_output_folder_in_use(self, tmp_path: Path, transformer: WanTransformer3DModel) -> None:
        (tmp_path / "out").mkdir()
        save_converted(transformer, tmp_path / "out")
        for save in (save_converted, save_native):
            with pytest.raises(ValueError, match=r"`output_dir` .*out' exists"):
                save(transformer, tmp_path / "out")


class TestPipelines:
    """A pipeline generates the same video after its transformer was converted to the native format and back."""

    OPTIONS = {
        "prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2,
        "guidance_scale": 2.0, "max_sequence_length": 16, "output_type": "pt",
    }  # fmt: skip

    def generate(self, pipeline: Any, **options: Any) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**self.OPTIONS, **options, generator=torch.Generator().manual_seed(0)).frames

    def there_and_back(self, pipeline_dir: Path, tmp_path: Path) -> WanTransformer3DModel:
        save_native(read_transformer(pipeline_dir / "transformer"), tmp_path / "native")
        save_converted(read_transformer(tmp_path / "native"), tmp_path / "transformer")
        return WanTransformer3DModel.from_pretrained(tmp_path / "transformer")

    def test_text_to_video(self, tmp_path: Path, pipeline_dir: Path) -> None:
        expected = self.generate(WanPipeline.from_pretrained(pipeline_dir))
        transformer = self.there_and_back(pipeline_dir, tmp_path)
        video = self.generate(WanPipeline.from_pretrained(pipeline_dir, transformer=transformer))
        torch.testing.assert_close(video, expected)

    def test_image_to_video(self, tmp_path: Path, i2v_pipeline_dir: Path) -> None:
        image = Image.new("RGB", (32, 32), (200, 30, 30))
        expected = self.generate(WanImageToVideoPipeline.from_pretrained(i2v_pipeline_dir), image=image)
        transformer = self.there_and_back(i2v_pipeline_dir, tmp_path)
        pipeline = WanImageToVideoPipeline.from_pretrained(i2v_pipeline_dir, transformer=transformer)
        torch.testing.assert_close(self.generate(pipeline, image=image), expected)


class RewardParts:
    """Upstream's three files, and the expected model."""

    def __init__(
        self,
        folder: Path,
        transformer: WanTransformer3DModel,
        num_layers: int = 2,
        kind: str = "t2v",
        widths: tuple[int, int] = (20, 10),
    ) -> None:
        torch.manual_seed(1)
        self.attention = torch.nn.MultiheadAttention(DIM, 8, batch_first=True)
        torch.nn.init.normal_(self.attention.in_proj_bias)
        torch.nn.init.normal_(self.attention.out_proj.bias)
        self.query = torch.randn(1, DIM)
        sizes = (DIM, *widths, 1)
        layers = {f"fc{index + 1}": torch.nn.Linear(*sizes[index : index + 2]) for index in range(3)}
        self.mlp = torch.nn.ModuleDict(layers)

        kept = re.compile(rf"^(head\.|blocks\.([{num_layers}-9]|\d\d)\.)")
        weights = {name: tensor for name, tensor in native_weights(transformer).items() if not kept.match(name)}
        self.transformer = write_native(folder / "checkpoint-100", weights, kind)
        self.mlp_file = folder / "mlp_step_100.ckpt"
        torch.save(self.mlp.state_dict(), self.mlp_file)
        self.query_file = folder / "query_attention_step_100.ckpt"
        state_dict = {f"multihead_attn.{name}": tensor for name, tensor in self.attention.state_dict().items()}
        torch.save({"queries": self.query, **state_dict}, self.query_file)

    def convert(self, **options: Any) -> WanRewardModel:
        return convert_reward_model(self.transformer, self.mlp_file, self.query_file, **options)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Upstream's pooling and MLP, built from torch's own modules."""
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
        output = reward_model(**self.INPUTS, output_features=True)
        torch.testing.assert_close(output.logits, parts.logits(output.features), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_round_trip(self, parts: RewardParts, tmp_path: Path) -> None:
        reward_model = parts.convert()
        save_converted(reward_model, tmp_path / "out")
        loaded = load_reward_model(str(tmp_path / "out"))
        assert_equal_weights(loaded.state_dict(), reward_model.state_dict())
        # Not bit for bit: weights that are mapped from a file are aligned in another way, which changes the kernels.
        torch.testing.assert_close(loaded(**self.INPUTS).logits, reward_model(**self.INPUTS).logits)

    @torch.no_grad()
    def test_options_that_no_file_tells(self, parts: RewardParts) -> None:
        logits = parts.convert()(**self.INPUTS).logits
        assert not torch.allclose(parts.convert(query_residual=False)(**self.INPUTS).logits, logits)
        assert not torch.allclose(parts.convert(num_query_heads=2)(**self.INPUTS).logits, logits)
        with pytest.raises(ValueError, match="num_query_heads"):
            parts.convert(num_query_heads=7)

    @pytest.mark.parametrize("kind", ["t2v", "i2v"])
    def test_back_to_upstreams_parts(self, tmp_path: Path, kind: str) -> None:
        parts = RewardParts(tmp_path / "parts", make_transformer(kind), kind=kind, widths=(1024, 512))
        save_converted(parts.convert(), tmp_path / "model")
        save_reward_parts(read_diffusers(WanRewardModel, tmp_path / "model"), tmp_path / "back")
        files = (f"checkpoint-0/{WEIGHTS_FILE}", "mlp_step_0.ckpt", "query_attention_step_0.ckpt")
        expected = [
            load_file(parts.transformer / WEIGHTS_FILE),
            torch.load(parts.mlp_file, weights_only=True),
            torch.load(parts.query_file, weights_only=True),
        ]
        found = [
            load_file(tmp_path / "back" / files[0]),
            *(torch.load(tmp_path / "back" / name, weights_only=True) for name in files[1:]),
        ]
        for weights, expected_weights in zip(found, expected, strict=True):
            assert_equal_weights(weights, expected_weights)
        entries = json.loads((tmp_path / "back" / "checkpoint-0" / "config.json").read_text())
        assert native_entries(kind).items() - {("text_len", 16)} <= entries.items()
        again = convert_reward_model(*(tmp_path / "back" / name for name in ("checkpoint-0", *files[1:])))
        assert_equal_weights(again.state_dict(), parts.convert().state_dict())
        assert again.config.base_num_layers == 3
        # The files have the size of their tensors: views are not saved with their whole storage.
        assert (tmp_path / "back" / files[2]).stat().st_size < 4 * 4 * DIM * DIM + 4000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"query_residual": False}, "out: `query_residual` must be True in upstream's format, got False"),
            ({"pooling": "mean"}, "out: `pooling` must be 'query' in upstream's format, got 'mean'"),
            (
                {"head_dims": (1024, 256)},
                r"out: `head_dims` must be \(1024, 512\), the widths .* `MLP`, got \(1024, 256\)",
            ),
            ({"kind": "wan2.2-ti2v"}, "out: upstream's code has no model of type 'ti2v'"),
            ({"kind": "wan2.2-i2v"}, "out: .* layers for image embeddings .* This model has none .*, like Wan2.2 I2V"),
        ],
    )
    def test_what_upstream_could_not_compute(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        transformer = make_transformer(options.get("kind", "t2v"))
        kept = {name: value for name, value in options.items() if name != "kind"}
        reward_model = WanRewardModel.from_transformer(transformer, num_layers=2, **kept)
        with pytest.raises(ValueError, match=message):
            save_reward_parts(reward_model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_too_many_blocks(self, parts: RewardParts) -> None:
        (parts.transformer / "config.json").write_text(json.dumps({**native_entries(), "num_layers": 1}))
        with pytest.raises(ValueError, match="2 blocks, more than `num_layers` 1 in config.json"):
            parts.convert()

    def test_generator_with_its_head_is_refused(self, parts: RewardParts, weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, parts.transformer / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=r"unexpected \(head\.head\.bias, head\.head\.weight, head\.modulation\)"):
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
class TestNumbersThatAreNotFinite:
    """A NaN or an infinity is an error that names the key in the file; it is never converted."""

    @pytest.mark.parametrize("key", ["blocks.1.self_attn.q.weight", "blocks.2.modulation", "head.head.bias"])
    def test_native_generator(self, tmp_path: Path, weights: dict[str, torch.Tensor], key: str, bad: float) -> None:
        folder = write_native(tmp_path / "wan", {**weights, key: weights[key].clone().fill_(bad)})
        with pytest.raises(ValueError, match=rf"wan: '{re.escape(key)}' holds a NaN or an infinity"):
            read_transformer(folder)

    @pytest.mark.parametrize("reward", [False, True])
    def test_diffusers_folder(
        self, tmp_path: Path, transformer: WanTransformer3DModel, reward: bool, bad: float
    ) -> None:
        model = WanRewardModel.from_transformer(transformer, num_layers=1) if reward else transformer
        model.save_pretrained(tmp_path / "model")
        saved = load_file(tmp_path / "model" / WEIGHTS_FILE)
        saved["blocks.0.attn1.to_k.bias"][0] = bad
        save_file(saved, tmp_path / "model" / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=r"model: 'blocks\.0\.attn1\.to_k\.bias' holds a NaN or an infinity"):
            read_diffusers(type(model), tmp_path / "model")

    @pytest.mark.parametrize(
        ("file", "key"),
        [("mlp_file", "fc2.bias"), ("query_file", "queries"), ("query_file", "multihead_attn.in_proj_bias")],
    )
    def test_reward_parts(self, parts: RewardParts, file: str, key: str, bad: float) -> None:
        path = getattr(parts, file)
        saved = torch.load(path, weights_only=True)
        saved[key].view(-1)[0] = bad
        torch.save(saved, path)
        with pytest.raises(ValueError, match=rf"{path.name}: '{re.escape(key)}' holds a NaN or an infinity"):
            parts.convert()

    def test_reward_transformer(self, parts: RewardParts, bad: float) -> None:
        saved = load_file(parts.transformer / WEIGHTS_FILE)
        saved["blocks.1.ffn.0.bias"][0] = bad
        save_file(saved, parts.transformer / WEIGHTS_FILE)
        with pytest.raises(ValueError, match=r"checkpoint-100.*'blocks\.1\.ffn\.0\.bias' holds a NaN"):
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
