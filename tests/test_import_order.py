"""A file may import only from the left: the order in which README asks to read the code."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "hy_prfl"
ORDER = [
    {"version", "configs"},
    {"flow_matching", "losses", "runtime"},
    {"formats"},
    {"models"},
    {"data"},
    {"rollout"},
    {"inference", "compatibility"},
    {"evaluation", "hub"},
    {"planning"},
    {"pages"},
    {"trainers"},
    {"scripts"},
    {"cli"},
]
APART = {("models", "data"), ("data", "models")}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    package = ("hy_prfl", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = base + tuple((node.module or "").split(".")) if node.module else base
            modules = [module] if len(module) > 1 else [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        rooms |= {module[1] for module in modules if module[0] == "hy_prfl" and len(module) > 1}
    return rooms


def rank(name: str) -> int:
    return next(index for index, names in enumerate(ORDER) if name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_to_the_left(path: Path) -> None:
    own = room(path)
    for other in imported_rooms(path):
        assert rank(other) <= rank(own), f"{path.name} imports {other}"
        assert (own, other) not in APART, f"{path.name} imports {other}"


def test_configs_do_without_the_libraries() -> None:
    recipes = [*(PACKAGE / "formats").glob("upstream_*.py"), PACKAGE / "formats" / "converted_recipe.py"]
    for path in [*(PACKAGE / "configs").glob("*.py"), *recipes]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("torch", "diffusers", "transformers", "datasets") for name in names)


def test_tests_of_the_package_do_without_the_examples() -> None:
    """Except that the documents are about both."""
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        if path.relative_to(tests).parts[0] in ("examples", "test_documents.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "examples"], path
