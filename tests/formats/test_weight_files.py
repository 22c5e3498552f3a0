import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hy_prfl.formats.weight_files import check_finite, check_keys, new_folder, read_checkpoint, read_json, read_weights


WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}


def assert_weights(found: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(WEIGHTS)
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in WEIGHTS.items())


class TestReadWeights:
    def test_one_file(self, tmp_path: Path) -> None:
        save_file(WEIGHTS, tmp_path / "model.safetensors")
        assert_weights(read_weights(tmp_path / "model.safetensors"))
        assert_weights(read_weights(tmp_path))

    @pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
    def test_pickled(self, tmp_path: Path, wrapper: str | None) -> None:
        path = tmp_path / "model.pt"
        torch.save(WEIGHTS if wrapper is None else {wrapper: WEIGHTS}, path)
        assert_weights(read_weights(path))

    def test_shards(self, tmp_path: Path) -> None:
        index = tmp_path / "m.safetensors.index.json"
        for key, tensor in WEIGHTS.items():
            save_file({key: tensor}, tmp_path / f"m-{key}.safetensors")
        index.write_text(json.dumps({"weight_map": {key: f"m-{key}.safetensors" for key in WEIGHTS}}))
        assert_weights(read_weights(tmp_path))
        weight_map = {key: f"m-{key}.safetensors" for key in WEIGHTS} | {"c": "m-a.safetensors"}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"m-a\.safetensors: keys do not fit: 1 missing \(c\)"):
            read_weights(tmp_path)
        index.write_text("{}")
        with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json: `weight_map` is missing"):
            read_weights(tmp_path)
        index.write_text(json.dumps({"weight_map": {"a": "m-a.safetensors", "b": "gone.safetensors"}}))
        with pytest.raises(FileNotFoundError, match=r"the shard 'gone\.safetensors' of m\.safetensors\.index\.json"):
            read_weights(tmp_path)
        (tmp_path / "other.safetensors.index.json").write_text("{}")
        with pytest.raises(ValueError, match="2 index files: m.*, other"):
            read_weights(tmp_path)

    def test_which_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no file or folder '.*none'"):
            read_weights(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="no safetensors file"):
            read_weights(tmp_path)
        save_file(WEIGHTS, tmp_path / "a.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match="2 safetensors files without an index"):
            read_weights(tmp_path)
        save_file(WEIGHTS, tmp_path / "diffusion_pytorch_model.safetensors")
        assert_weights(read_weights(tmp_path))

    def test_cut_short(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file"):
            read_weights(path)


class Unwanted:
    """Something that only a pickle with code in it brings back."""


class TestReadCheckpoint:
    def test_code_is_refused(self, tmp_path: Path) -> None:
        torch.save({"a": Unwanted()}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt: not a checkpoint of tensors alone"):
            read_checkpoint(tmp_path / "a.ckpt")

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
    def test_not_a_checkpoint(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.ckpt: not a checkpoint"):
            read_checkpoint(tmp_path / "a.ckpt")

    def test_other_values(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt: expected a state dict, tensors by name, got list"):
            read_checkpoint(tmp_path / "a.ckpt")
        torch.save({1: torch.ones(2)}, tmp_path / "a.ckpt")
        with pytest.raises(
            ValueError, match=r"a\.ckpt: expected a state dict, tensors by name, got the int 1 as a name"
        ):
            read_checkpoint(tmp_path / "a.ckpt")
        torch.save({"module": WEIGHTS, "step": 3}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt: expected a state dict, but 'module' is a dict"):
            read_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
            read_checkpoint(tmp_path / "none.ckpt")


def test_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    for text, message in (("{", "not valid JSON"), ("[]", "expected a mapping, got list")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json: {message}"):
            read_json(tmp_path / "a.json")


def test_keys() -> None:
    check_keys({"a": 1}, ["a"], source="x")
    with pytest.raises(
        ValueError, match=r"x: keys do not fit: 1 missing \(b\) and 6 unexpected \(c0, .*c4, \.\.\.\)\."
    ):
        check_keys([f"c{i}" for i in range(6)], ["b"], source="x")


class TestNewFolder:
    def test_appears_when_complete(self, tmp_path: Path) -> None:
        target = tmp_path / "a" / "out"
        with new_folder(target) as folder:
            (folder / "x").write_text("1")
            assert not target.exists()
        assert [path.name for path in target.iterdir()] == ["x"]
        assert [path.name for path in target.parent.iterdir()] == ["out"]

    def test_failure_leaves_nothing(self, tmp_path: Path) -> None:
        def write() -> None:
            with new_folder(tmp_path / "out") as folder:
                (folder / "x").write_text("1")
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write()
        assert list(tmp_path.iterdir()) == []

    def test_target_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with new_folder(tmp_path / "empty"):
            pass
        (tmp_path / "file").touch()
        for name in ("file", ""):
            with pytest.raises(ValueError, match="exists and is not an empty folder"), new_folder(tmp_path / name):
                pass


FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    fine = torch.linspace(-1, 1, 6).reshape(2, 3).to(dtype)
    others = {"empty": torch.empty(0), "whole": torch.tensor([3]), "truth": torch.tensor(True)}
    check_finite({"a": fine, **others, "none": torch.empty(2, device="meta")}.items(), source="x")
    if dtype == torch.float8_e4m3fn:
        # It has no infinities.
        bad = math.nan
    broken = fine.clone().to(torch.complex64 if dtype.is_complex else torch.float32)
    broken[1, 2] = bad
    with pytest.raises(ValueError, match=r"^x: 'b' holds a NaN or an infinity\.$"):
        check_finite({"a": fine, "b": broken.to(dtype)}.items(), source="x")
