"""Conversion of recipes with the keys of upstream's."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hy_prfl.configs.parser import parse_config
from hy_prfl.formats.converted_recipe import ConvertedRecipe
from hy_prfl.formats.upstream_recipe import CONFIGS, convert_recipe
from tests.formats.upstream_recipes import Convert, upstream_recipe


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Function that converts a recipe, with keys changed, and parses the YAML that is written for it."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, changes: dict[str, Any] | None = None, **arguments: Any) -> tuple[ConvertedRecipe, Any]:
        source = tmp_path / f"{name}.yaml"
        source.write_text(yaml.safe_dump(upstream_recipe(name, changes)))
        converted = convert_recipe(source, **arguments)
        (tmp_path / "new.yaml").write_text(converted.to_yaml("new.yaml"), encoding="utf-8")
        # The command that the head of the file ends with.
        words = shlex.split(converted.commands("new.yaml")[-1])
        options = words[words.index("--config") :]
        return converted, parse_config(CONFIGS[converted.command], options)

    return run
