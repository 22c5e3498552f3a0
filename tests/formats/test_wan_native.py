"""Names and configurations of Wan's native layout, against a table of our own and against diffusers' converter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from hy_prfl.formats.wan_native import (
    key_names,
    layer_names,
    native_config,
    read_native_config,
    strip_prefix,
    transformer_config,
)

from .native_layout import KINDS, make_transformer, native_entries, native_name, native_weights


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class TestNames:
    def test_keys_are_those_of_the_table_and_of_diffusers(self, kind: str) -> None:
        state_dict = make_transformer(kind, num_layers=12).state_dict()
        names = key_names(range(12))
        found = {key: names[key] for key in state_dict}
        assert found == {key: native_name(key) for key in state_dict}
        renamed = convert_wan_transformer_to_diffusers({native: native for native in found.values()})
        position = renamed.pop("img_emb.emb_pos", None)
        if position is not None:
            renamed["condition_embedder.image_embedder.pos_embed"] = position
        assert renamed == found

    def test_layers_are_the_linear_ones(self, kind: str) -> None:
        transformer = make_transformer(kind)
        linear = {
            name
            for name, module in transformer.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)
        }
        names = layer_names(range(3))
        assert linear <= set(names)
        assert {name: names[name] + ".weight" for name in linear} == {
            name: native_name(f"{name}.weight") for name in linear
        }
        image_layers = {name for name in names if "image_embedder" in name or ".add_" in name}
        assert set(names) - linear == (set() if transformer.config.image_dim else image_layers)

    def test_only_the_blocks_that_are_asked_for(self) -> None:
        blocks = {name.split(".")[1] for name in layer_names([7, 2]) if name.startswith("blocks.")}
        assert blocks == {"2", "7"}

    def test_prefix_of_whole_checkpoints(self) -> None:
        assert strip_prefix({"model.diffusion_model.a": 1, "model.diffusion_model.b": 2}) == {"a": 1, "b": 2}
        mixed = {"model.diffusion_model.a": 1, "vae.b": 2}
        assert strip_prefix(mixed) == mixed


class TestConfig:
    def test_both_ways(self, kind: str) -> None:
        transformer = make_transformer(kind)
        expected = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        entries = native_config(transformer.config, text_len=16, source="x")
        assert entries | native_entries(kind) == entries
        config = transformer_config(entries, native_weights(transformer), source="x")
        rebuilt = WanTransformer3DModel(**config).config
        assert {name: rebuilt[name] for name in expected} == expected

    @pytest.mark.parametrize(
        ("name", "value"), [("qk_norm", "rms_norm"), ("cross_attn_norm", False), ("added_kv_proj_dim", 8)]
    )
    def test_what_native_code_has_no_word_for(self, name: str, value: object) -> None:
        config = dict(make_transformer().config) | {name: value}
        with pytest.raises(ValueError, match=f"out: `{name}` must be .* got {value}"):
            native_config(config, source="out")

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"num_heads": 5}, "`num_heads` 5 does not divide `dim` 24"),
            ({"qk_norm": False}, "`qk_norm` must be True"),
            ({"model_type": "vace"}, "`model_type` must be one of"),
            ({"vace_layers": 3}, "unknown entries vace_layers"),
            ({"_class_name": "WanTransformer3DModel"}, "configuration of a diffusers model"),
        ],
    )
    def test_entries(self, tmp_path: Path, entries: dict[str, Any], message: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**native_entries(), **entries}))
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            read_native_config(tmp_path)
        with pytest.raises(ValueError, match=message):
            read_native_config(path)

    def test_missing_entry(self, tmp_path: Path) -> None:
        entries = native_entries()
        del entries["num_heads"]
        (tmp_path / "config.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match="`num_heads` is missing"):
            read_native_config(tmp_path)

    def test_bookkeeping_of_upstreams_trainer(self, tmp_path: Path) -> None:
        bookkeeping = {"_name_or_path": "weights/Wan2.1", "_use_default_values": ["eps"], "_class_name": "WanModel"}
        (tmp_path / "config.json").write_text(json.dumps({**native_entries(), **bookkeeping}))
        assert read_native_config(tmp_path)["num_heads"] == 2

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"dim": 48}, "`dim` 48, the weights have 24"),
            ({"in_dim": 36}, "`in_dim` 36, the weights have 16"),
            ({"ffn_dim": 64}, "`ffn_dim` 64, the weights have 32"),
            ({"out_dim": 48}, "`out_dim` 48, the weights have 16"),
        ],
    )
    def test_entries_against_weights(self, entries: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"a.safetensors: config.json says {message}"):
            transformer_config(
                {**native_entries(), **entries}, native_weights(make_transformer()), source="a.safetensors"
            )

    def test_weights_that_tell_no_size(self) -> None:
        weights = native_weights(make_transformer())
        with pytest.raises(ValueError, match=r"x: 'text_embedding\.0\.weight' must have 2 dimensions, got \(3,\)"):
            transformer_config(native_entries(), weights | {"text_embedding.0.weight": torch.zeros(3)}, source="x")
        del weights["time_embedding.0.weight"]
        with pytest.raises(ValueError, match=r"x: the weight 'time_embedding\.0\.weight' is missing"):
            transformer_config(native_entries(), weights, source="x")
