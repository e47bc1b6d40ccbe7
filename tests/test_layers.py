"""Imports within the package only go down (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = (
    {"errors"},
    {"config", "files"},
    {"preprocessing"},
    {"models"},
    {"kernels"},
    {"checkpoints"},
    {"engine"},
    {"finetuning"},
    {"captioning", "evaluation", "vllm_plugin", "doctor"},
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "xgenmm").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def layer(module: str) -> str:
    """`xgenmm.engine.core` -> `engine`."""
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_lower_layers(path: Path) -> None:
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    names = {name for name in imported_modules(path) if name.startswith("xgenmm.")}
    if own in LEVELS:
        allowed = {other for other in LEVELS if LEVELS[other] < LEVELS[own]} | {own}
        assert {layer(name) for name in names} <= allowed


def test_library_knows_no_server_and_no_tests() -> None:
    forbidden = ("cog", "predict", "scripts", "tests")
    for path in MODULES:
        assert not [n for n in imported_modules(path) if n.split(".")[0] in forbidden], path


def test_init_files_of_subpackages_are_empty() -> None:
    inits = sorted((ROOT / "xgenmm").glob("*/__init__.py"))
    assert [str(path) for path in inits if path.read_text()] == []
