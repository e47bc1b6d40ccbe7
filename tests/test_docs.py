"""The documentation refers only to what exists."""

import re
from pathlib import Path

import pytest

from tests.support.paths import DEMO, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_existing_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    names = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|json|yaml|toml))`", page.read_text())
    roots = (ROOT, ROOT / "xgenmm", ROOT / "weights", page.parent)
    generated = {"manifest.json", "releases.lock.json", "_settings.json", "settings.json"}
    generated |= {"adapter_config.json"}
    checkpoint_files = {path.name for path in DEMO.iterdir()}
    missing = [
        name
        for name in names
        if name.removeprefix("NAME/") not in generated | checkpoint_files
        and not any((root / name).exists() for root in roots)
    ]
    assert missing == []


def test_architecture_lists_every_module() -> None:
    listing = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    words = set(re.findall(r"\w+", listing))
    packages = ("engine", "kernels", "models", "preprocessing")
    modules = [
        path.stem for name in packages for path in (ROOT / "xgenmm" / name).glob("[a-z]*.py")
    ]
    assert [module for module in modules if module not in words] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
