"""Fonts for signs: the usable ones among those installed, split into training and held-out.

The held-out families come from packages of the development requirements, so that every machine
evaluates on the same fonts.
"""

import sysconfig
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from scripts.demo_model.scene import LETTERS

# Font families that only the evaluation uses, and the packages that contain them.
HELD_OUT_FAMILIES: Mapping[str, str] = {
    "Roboto": "font_roboto",
    "Source Sans Pro": "font_source_sans_pro",
    "Source Serif Pro": "font_source_serif_pro",
    "Hanken Grotesk": "font_hanken_grotesk",
    "Manrope": "font_manrope",
    "Caladea": "font_caladea",
}
# Parts of names of fonts whose capitals are not plain upright letters.
_UNSUITABLE = (
    "italic", "oblique", "slanted", "thin", "hairline", "ultralight", "extralight", "extlt",
    "variable", "outline", "shadow", "symbol", "keyboard", "initials", "small caps", "smallcaps",
    "math", "sizefour", "sizethree", "sizetwo", "sizeone", "nonunicode", "cmsy", "cmmi", "cmex",
    "cmti",
)  # fmt: skip


def find_fonts(folders: Iterable[Path]) -> list[Path]:
    """Find the fonts below `folders` whose capitals are plain, upright and all different.

    Only one of several files with the same family and style (TrueType and OpenType, several
    packages) is returned. The result is sorted by family and style, whatever the folders' order.
    """
    found: dict[tuple[str, str], Path] = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".ttf", ".otf"}):
            names = _family_and_style(path)
            if names is not None and names not in found and _is_legible(path):
                found[names] = path
    return [found[names] for names in sorted(found)]


def split_fonts(fonts: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Split fonts by family into (training, held out).

    Relatives of a held-out family, such as Roboto Slab, are in neither list: training must not see
    a near twin of a held-out font.

    Raises:
        ValueError: a file cannot be read as a font.
    """
    train: list[Path] = []
    held_out: list[Path] = []
    for path in fonts:
        names = _family_and_style(path)
        if names is None:
            raise ValueError(f"fonts: {path} cannot be read as a font")
        if names[0] in HELD_OUT_FAMILIES:
            held_out.append(path)
        elif not names[0].startswith(tuple(HELD_OUT_FAMILIES)):
            train.append(path)
    return train, held_out


def held_out_fonts() -> list[Path]:
    """The evaluation's fonts, found in their packages only.

    Raises:
        ModuleNotFoundError: a font package is not installed.
    """
    folders: list[Path] = []
    for package in HELD_OUT_FAMILIES.values():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            name = package.replace("_", "-")
            raise ModuleNotFoundError(f"fonts: install {name}, a development requirement")
        folders += map(Path, spec.submodule_search_locations)
    return split_fonts(find_fonts(folders))[1]


def training_fonts(*, system: bool = True) -> list[Path]:
    """All other usable fonts of Python packages and, if `system`, of this machine."""
    folders = [Path("/usr/share/fonts")] * system + [Path(sysconfig.get_path("purelib"))]
    return split_fonts(find_fonts(folders))[0]


@lru_cache(maxsize=1024)
def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels."""
    return ImageFont.truetype(str(path), size)


def _family_and_style(path: Path) -> tuple[str, str] | None:
    try:
        family, style = ImageFont.truetype(str(path), 20).getname()
    except OSError:
        return None
    return (family or path.stem, style or "Regular")


def _is_legible(path: Path) -> bool:
    names = f"{_family_and_style(path)} {path.stem}".lower()
    if any(word in names for word in _UNSUITABLE):
        return False
    font = ImageFont.truetype(str(path), 40)
    masks = set()
    for letter in LETTERS:
        x0, y0, x1, y1 = font.getbbox(letter, anchor="ls")
        # A capital stands on the baseline and is between half and one font size high.
        if x1 - x0 < 2 or not 15 <= y1 - y0 <= 48 or y1 < -2:
            return False
        masks.add(bytes(font.getmask(letter)))
    return len(masks) == len(LETTERS)
