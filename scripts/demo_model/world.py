"""The world of the demo checkpoint: scenes, their pictures, and questions with their answers.

A scene is 1 to 4 shapes that do not overlap on a plain light background, and sometimes a sign (a
white box with one upper-case word). Everything here is a pure function of its arguments: all
chance comes from the `random.Random` that the caller hands in, so equal seeds give equal scenes,
questions and pictures in any process. Knows nothing of models and tokens.

Lengths are pixels of the picture, x to the right and y down; a box is (x0, y0, x1, y1). Pixel
(column i, row j) covers the square from (i, j) to (i + 1, j + 1).
"""

import colorsys
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "yellow", "black", "purple", "orange")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIRECTIONS = ("left", "right", "above", "below")

MIN_SIDE, MAX_SIDE = 64, 640
MAX_ASPECT = 3.0
MIN_SHAPE, MAX_SHAPE = 1 / 8, 0.45  # of the shorter side
_SMALLEST = 1.02 * MIN_SHAPE  # leaves room for the rounding of a picture's sides

# Classes of `label_map`: 0 background, then the shape/colour pairs, the letters, the empty sign.
FIRST_LETTER_CLASS = 1 + len(KINDS) * len(COLORS)
SIGN_CLASS = FIRST_LETTER_CLASS + len(LETTERS)
NUM_CLASSES = SIGN_CLASS + 1

QUESTION_KINDS = ("caption", "count", "color", "shape", "existence", "place", "sign", "pair")
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "caption": 1.0,
    "count": 1.5,
    "color": 1.0,
    "shape": 1.0,
    "existence": 1.0,
    "place": 2.0,
    "sign": 1.5,
}

# Hue in degrees, then saturation and value; wide enough to hold the web's and matplotlib's colours
# of these names, and kept apart from the neighbours.
_SHADES: Mapping[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 4), (0.78, 1.0), (0.7, 1.0)),
    "orange": ((23, 38), (0.8, 1.0), (0.92, 1.0)),
    "yellow": ((50, 62), (0.7, 1.0), (0.9, 1.0)),
    "green": ((98, 155), (0.55, 1.0), (0.4, 0.9)),
    "blue": ((205, 240), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((270, 302), (0.5, 1.0), (0.42, 0.75)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.14)),
}

_INKS: tuple[Rgb, ...] = ((0, 0, 0), (20, 20, 20), (45, 45, 50), (15, 25, 60), (60, 20, 20))

# Families kept for the evaluation, and the packages of requirements-dev.txt that hold them.
HELD_OUT_FAMILIES: Mapping[str, str] = {
    "Roboto": "font_roboto",
    "Source Sans Pro": "font_source_sans_pro",
    "Source Serif Pro": "font_source_serif_pro",
    "Hanken Grotesk": "font_hanken_grotesk",
    "Manrope": "font_manrope",
    "Caladea": "font_caladea",
}
# Styles and families whose capitals are not plain upright letters.
_UNFIT_FONTS = (
    "italic", "oblique", "slanted", "thin", "hairline", "ultralight", "extralight", "extlt",
    "variable", "outline", "shadow", "symbol", "keyboard", "initials", "small caps", "smallcaps",
    "math", "sizefour", "sizethree", "sizetwo", "sizeone", "nonunicode", "cmsy", "cmmi", "cmex",
    "cmti",
)  # fmt: skip

_WORDS = """
    AIR ALL ART ASK BAG BAKE BANK BAR BATH BEACH BEER BELL BIKE BIRD BLUE BOAT BOOK BOX BREAD BUS
    BUY CAFE CAKE CALL CAMP CAR CARD CASH CHEF CITY CLEAN CLUB COAST COCOA COLD COOK COOL CRAFT
    DAILY DAY DEAL DELI DESK DINER DOCK DOG DOOR DOWN DRINK DRY EAST EAT ENTER EXIT FARM FAST FILM
    FIRE FISH FLAT FOOD FREE FRESH FRUIT FUEL FUN GAME GAS GATE GIFT GLASS GOLD GREEN GRILL GYM
    HALL HAT HELP HERE HILL HOME HOT HOTEL HOUSE HUB ICE INFO INN JAZZ JOB JUICE KEY KIDS KING
    LAKE LAND LANE LEFT LIFT LIVE LOFT LOST LUCK LUNCH MAIN MALL MAP MATCH MEAT MEET MENU MILK
    MINT MOON MOTEL MUSIC NEW NEWS NEXT NIGHT NORTH NUTS OAK OPEN ORDER OVEN PAPER PARK PASS PAY
    PHONE PIER PIZZA PLAY POOL PORT POST PRICE PUB PUSH QUICK QUIET RACE RADIO RAIL RENT REST RIDE
    RIGHT RIVER ROAD ROOM SAFE SALE SALON SALT SAVE SEA SEAT SELL SHIP SHOE SHOP SHOW SKI SLOW
    SNACK SNOW SOAP SODA SOLD SOUP SOUTH SPA SPICE STAFF STAGE STAIR STAR START STAY STOP STORE
    SUGAR SUN SURF SUSHI SWIM TACO TAXI TEA TEAM TENT TIGER TIME TOOLS TOUR TOWN TOYS TRAIN TREE
    VALET VAN VIEW VOTE WAIT WALK WARM WASH WATER WAY WEST WINE WOOD WOOL WORK YARD YES YOGA
    ZEBRA ZERO ZONE ZOO
"""
COMMON_WORDS = tuple(_WORDS.split())

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "caption": (
        "Describe the image.",
        "Describe the picture.",
        "Describe this image.",
        "What is in the image?",
        "What is in this picture?",
        "What do you see?",
        "What does the image show?",
        "Write a caption for the image.",
        "Please describe this picture.",
    ),
    "count": (
        "How many {things} are there?",
        "How many {things} do you see?",
        "How many {things} are in the image?",
        "How many {things} are in the picture?",
        "How many {things} does the image have?",
        "Count the {things}.",
        "What is the number of {things}?",
    ),
    "color": (
        "What color is the {thing}?",
        "What colour is the {thing}?",
        "Which color is the {thing}?",
        "What is the color of the {thing}?",
        "Which color does the {thing} have?",
        "Tell me the color of the {thing}.",
    ),
    "shape": (
        "What shape is {color}?",
        "Which shape is {color}?",
        "What is the {color} shape?",
        "What shape is the {color} one?",
        "What kind of shape is {color}?",
        "Name the {color} shape.",
    ),
    "existence": (
        "Is there {a_thing}?",
        "Is there {a_thing} in the image?",
        "Is there {a_thing} in the picture?",
        "Do you see {a_thing}?",
        "Does the image have {a_thing}?",
        "Does the picture show {a_thing}?",
        "Can you see {a_thing}?",
    ),
    "place": (
        "What is {direction} the {thing}?",
        "What do you see {direction} the {thing}?",
        "What can you see {direction} the {thing}?",
        "What lies {direction} the {thing}?",
        "Tell me what is {direction} the {thing}.",
        "Which shape is {direction} the {thing}?",
        "What shape is {direction} the {thing}?",
    ),
    "sign": (
        "What does the sign say?",
        "What is written on the sign?",
        "What word is on the sign?",
        "Which word does the sign show?",
        "What is on the sign?",
        "Read the sign.",
    ),
    "pair same": (
        "Is the second image the same as the first?",
        "Is the first image the same as the second?",
        "Are the two images the same?",
        "Are both images the same?",
        "Are the pictures the same?",
        "Do both pictures show the same?",
    ),
    "pair more": (
        "Which image has more {things}?",
        "Which picture has more {things}?",
        "Which image shows more {things}?",
        "Which of the two images has more {things}?",
        "In which image are there more {things}?",
    ),
    "pair fewer": (
        "Which image has fewer {things}?",
        "Which picture has fewer {things}?",
        "Which image shows fewer {things}?",
        "In which image are there fewer {things}?",
    ),
    "pair has": (
        "Which image has {a_thing}?",
        "Which picture has {a_thing}?",
        "Which image shows {a_thing}?",
        "Which of the two images has {a_thing}?",
        "In which image is there {a_thing}?",
    ),
}
_DIRECTION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Shape:
    """One shape. `box` are the tight bounds of what is drawn, its rotation by `angle` included."""

    kind: str
    color: str
    box: Box
    angle: float  # degrees, anticlockwise
    shade: Rgb  # the colour as drawn, one of the many that `color` names

    @property
    def name(self) -> str:
        """Colour and kind, as in an answer: `red star`."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Sign:
    """A white box with one word. `letters` are the tight boxes of the word's letters, in order."""

    word: str
    box: Box
    letters: tuple[Box, ...]
    font: Path
    font_size: int
    ink: Rgb


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. `shapes` are in the order in which they were placed."""

    width: int
    height: int
    background: Rgb
    shapes: tuple[Shape, ...]
    sign: Sign | None

    @property
    def short(self) -> int:
        """The shorter side in pixels, the unit of sizes and margins."""
        return min(self.width, self.height)


@dataclass(frozen=True)
class QA:
    """A question of one of `QUESTION_KINDS` and its one right answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Case:
    """One question of the evaluation set; the cases of one picture or pair follow each other."""

    scenes: tuple[Scene, ...]
    kind: str
    question: str
    answer: str

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures that go with the question, drawn anew at each call."""
        return tuple(draw(scene) for scene in self.scenes)


# Fonts


def find_fonts(folders: Iterable[Path]) -> list[Path]:
    """Find the fonts below `folders` whose capitals are plain, upright and all different.

    Of the files with equal family and style (ttf and otf, several packages) one is kept. The
    result is ordered by family and style, so that it does not depend on the folders' order.
    """
    found: dict[tuple[str, str], Path] = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".ttf", ".otf"}):
            names = _font_names(path)
            if names is not None and names not in found and _is_legible(path):
                found[names] = path
    return [found[names] for names in sorted(found)]


def split_fonts(fonts: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Split fonts into (to train on, held out) by family.

    Held out are the families of `HELD_OUT_FAMILIES`. Their relatives, whose names begin like
    theirs (Roboto Slab), are in neither list: no near twin of a held-out face is trained on.
    """
    train: list[Path] = []
    held_out: list[Path] = []
    for path in fonts:
        names = _font_names(path)
        if names is None:
            raise ValueError(f"fonts: {path} cannot be read as a font")
        if names[0] in HELD_OUT_FAMILIES:
            held_out.append(path)
        elif not names[0].startswith(tuple(HELD_OUT_FAMILIES)):
            train.append(path)
    return train, held_out


def held_out_fonts() -> list[Path]:
    """The evaluation's fonts, from the installed packages alone, so that they are always the same.

    Raises:
        ModuleNotFoundError: a font package is not installed.
    """
    folders: list[Path] = []
    for package in HELD_OUT_FAMILIES.values():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            name = package.replace("_", "-")
            raise ModuleNotFoundError(f"fonts: install {name} (it is in requirements-dev.txt)")
        folders += map(Path, spec.submodule_search_locations)
    return split_fonts(find_fonts(folders))[1]


def _font_names(path: Path) -> tuple[str, str] | None:
    try:
        family, style = ImageFont.truetype(str(path), 20).getname()
    except OSError:
        return None
    return (family or path.stem, style or "Regular")


def _is_legible(path: Path) -> bool:
    names = f"{_font_names(path)} {path.stem}".lower()
    if any(word in names for word in _UNFIT_FONTS):
        return False
    font = ImageFont.truetype(str(path), 40)
    drawn = set()
    for letter in LETTERS:
        x0, y0, x1, y1 = font.getbbox(letter, anchor="ls")
        # A capital stands on the base line and rises between a half and a whole font size.
        if x1 - x0 < 2 or not 15 <= y1 - y0 <= 48 or y1 < -2:
            return False
        drawn.add(bytes(font.getmask(letter)))
    return len(drawn) == len(LETTERS)


@lru_cache(maxsize=1024)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


# Scenes


def sample_scene(
    rng: random.Random, fonts: Sequence[Path], *, level: float, with_sign: bool | None = None
) -> Scene:
    """Sample a scene.

    Args:
        rng: the only source of chance.
        fonts: faces for the sign.
        level: from 0 (near-square pictures, one or two large shapes, large letters) to 1 (the
            whole world); what level 1 shows includes what lower levels show.
        with_sign: whether there is a sign; None for one scene in three.
    """
    if with_sign is None:
        with_sign = rng.random() < 1 / 3
    width, height = _sample_size(rng, level)
    taken: list[Box] = []
    sign = _sample_sign(rng, fonts, width, height, level) if with_sign else None
    if sign is not None:
        taken.append(sign.box)

    # Few kinds or few colours in half of the scenes: equal ones make counts and names interesting.
    kinds = rng.sample(KINDS, 2) if rng.random() < 0.3 else list(KINDS)
    colors = rng.sample(COLORS, 2) if rng.random() < 0.3 else list(COLORS)
    count = rng.choices((1, 2, 3, 4), (1, 1 + level, 2 * level, 2 * level))[0]
    low = 0.3 + (_SMALLEST - 0.3) * level
    high = MAX_SHAPE * (1 if count < 3 and sign is None else 0.85)
    shapes: list[Shape] = []
    for size in sorted((rng.uniform(low, high) for _ in range(count)), reverse=True):
        shape = _place_shape(rng, rng.choice(kinds), size, width, height, taken)
        if shape is not None:
            taken.append(shape.box)
            shapes.append(replace(shape, color=(c := rng.choice(colors)), shade=_shade(rng, c)))
    if not shapes:
        return sample_scene(rng, fonts, level=level, with_sign=with_sign)
    rng.shuffle(shapes)
    return Scene(width, height, _background(rng), tuple(shapes), sign)


def _sample_size(rng: random.Random, level: float) -> tuple[int, int]:
    """Width and height: aspect uniform in its logarithm, then a longer side that suits it."""
    limit = 1.25 * (MAX_ASPECT / 1.25) ** level
    aspect = math.exp(rng.uniform(-math.log(limit), math.log(limit)))
    ratio = max(aspect, 1 / aspect)
    long = rng.uniform(max(MIN_SIDE * ratio, 64 + 64 * (1 - level)), MAX_SIDE)
    # The rounding must not leave the bounds.
    short = max(MIN_SIDE, math.ceil(long / ratio))
    long_side = min(MAX_SIDE, max(short, round(long)))
    return (long_side, short) if aspect >= 1 else (short, long_side)


def _place_shape(
    rng: random.Random, kind: str, size: float, width: int, height: int, taken: Sequence[Box]
) -> Shape | None:
    """Find a free place for a shape of about `size` shorter sides, or None after many tries."""
    short = min(width, height)
    tilt = {"circle": 0.0, "square": 12.0, "triangle": 15.0, "star": 18.0}[kind]
    angle = rng.uniform(-tilt, tilt)
    gap = max(2.0, 0.04 * short)
    aspect_w, aspect_h = _outline(kind, angle)[1]
    smallest = _SMALLEST / min(aspect_w, aspect_h)
    for attempt in range(30):
        extent = max(smallest, size * 0.95**attempt) * short
        w, h = extent * aspect_w, extent * aspect_h
        x = rng.uniform(1, width - w - 1)
        y = rng.uniform(1, height - h - 1)
        box = (x, y, x + w, y + h)
        if not any(_overlap(box, other, gap) for other in taken):
            return Shape(kind, "", box, angle, (0, 0, 0))
    return None


def _overlap(a: Box, b: Box, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _shade(rng: random.Random, color: str) -> Rgb:
    hue, saturation, value = (rng.uniform(*limits) for limits in _SHADES[color])
    r, g, b = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _background(rng: random.Random) -> Rgb:
    if rng.random() < 0.3:
        return (255, 255, 255)
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.1), rng.uniform(0.88, 1))
    return round(r * 255), round(g * 255), round(b * 255)


def sample_word(rng: random.Random) -> str:
    """Sample a sign's word: 3 to 5 letters, half of them no words, so that letters must be read."""
    draw_kind = rng.random()
    if draw_kind < 0.5:
        return rng.choice(COMMON_WORDS)
    length = rng.randint(3, 5)
    if draw_kind < 0.7:
        vowels, consonants = "AEIOUY", "BCDFGHJKLMNPQRSTVWXZ"
        start = rng.randrange(2)
        return "".join(rng.choice((vowels, consonants)[(start + i) % 2]) for i in range(length))
    return "".join(rng.choices(LETTERS, k=length))


def _sample_sign(
    rng: random.Random, fonts: Sequence[Path], width: int, height: int, level: float
) -> Sign:
    """Sample a sign whose letters are at least about a seventh of the shorter side high."""
    word = sample_word(rng)
    path = rng.choice(fonts)
    short = min(width, height)
    text_w, text_h = _text_extent(word, path)
    tallest = min(0.34 * short, 0.86 * width * text_h / text_w)
    # In a wide picture letters are higher: squeezed to one square tile they must stay legible.
    lowest = min(tallest, (0.16 + 0.08 * (1 - level)) * math.sqrt(width * height))
    letter_height = rng.uniform(lowest, tallest)
    pad_x, pad_y = rng.uniform(0.3, 0.6) * letter_height, rng.uniform(0.3, 0.6) * letter_height
    box_w = min(width - 2, letter_height * text_w / text_h + 2 * pad_x)
    box_h = letter_height + 2 * pad_y
    x = rng.uniform(1, width - 1 - box_w)
    y = rng.uniform(1, height - 1 - box_h)
    ink = rng.choice(_INKS)
    return _fit_sign(word, path, (x, y, x + box_w, y + box_h), letter_height, ink)


_FIT_SIZE = 100


@lru_cache(maxsize=4096)
def _glyphs(path: Path, size: int) -> dict[str, tuple[Box, float]]:
    """The capitals' tight boxes about the pen on the base line, and their advances."""
    font = _font(path, size)
    return {c: (font.getbbox(c, anchor="ls"), font.getlength(c)) for c in LETTERS}


def _letter_boxes(word: str, path: Path, size: int) -> list[Box]:
    """The letters' tight boxes with the first pen at the origin, a little wider set than usual."""
    glyphs = _glyphs(path, size)
    pen = 0.0
    boxes: list[Box] = []
    for letter in word:
        (x0, y0, x1, y1), advance = glyphs[letter]
        boxes.append((pen + x0, y0, pen + x1, y1))
        pen += advance + 0.05 * size
    return boxes


def _bounds(boxes: Sequence[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _text_extent(word: str, path: Path) -> tuple[float, float]:
    x0, y0, x1, y1 = _bounds(_letter_boxes(word, path, _FIT_SIZE))
    return x1 - x0, y1 - y0


def _fit_sign(word: str, path: Path, box: Box, letter_height: float, ink: Rgb) -> Sign:
    """Centre the word in the box, `letter_height` high, less if it would leave the box."""
    text_w, text_h = _text_extent(word, path)
    scale = min(letter_height / text_h, 0.92 * (box[2] - box[0]) / text_w)
    size = max(6, int(_FIT_SIZE * scale))
    letters = _letter_boxes(word, path, size)
    x0, y0, x1, y1 = _bounds(letters)
    dx = round((box[0] + box[2] - x0 - x1) / 2)
    dy = round((box[1] + box[3] - y0 - y1) / 2)
    moved = tuple((a + dx, b + dy, c + dx, d + dy) for a, b, c, d in letters)
    return Sign(word, box, moved, path, size, ink)


def sample_page(rng: random.Random, fonts: Sequence[Path]) -> list[Scene]:
    """Sample a page of signs to learn letters from: scenes of one size with one sign each.

    The signs lie below one another; `draw_page` shows them in one picture. The letters are as
    large as the tiles of a scene's picture show them, and squeezed as much.
    """
    width, height = rng.randint(120, 480), rng.randint(120, 480)
    background = _background(rng)
    scenes: list[Scene] = []
    top = rng.uniform(0.0, 0.1) * height
    while True:
        path = rng.choice(fonts)
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
        text_w, text_h = _text_extent(word, path)
        letter_height = min(rng.uniform(0.1, 0.5) * height, 0.9 * width * text_h / text_w)
        bottom = top + letter_height * rng.uniform(1.3, 1.8)
        if bottom > height:
            return scenes or sample_page(rng, fonts)
        margin = (width - letter_height * text_w / text_h) / 2 * rng.uniform(0.1, 0.9)
        shift = rng.uniform(-1, 1) * margin * 0.9
        box = (max(0.0, margin + shift), top, min(width, width - margin + shift), bottom)
        ink = rng.choice(_INKS)
        sign = _fit_sign(word, path, box, letter_height, ink)
        scenes.append(Scene(width, height, background, (), sign))
        top = bottom + rng.uniform(0.0, 0.1) * height


def draw_page(scenes: Sequence[Scene]) -> Image.Image:
    """Draw the signs of `scenes`, which share a size, in one picture."""
    image = draw(scenes[0])
    for scene in scenes[1:]:
        if scene.sign is not None:
            _draw_sign(image, scene.sign, scene.short)
    return image


# Pictures


@lru_cache(maxsize=4096)
def _outline(kind: str, angle: float) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Corner points of a shape in its own box (0 to 1) and the box's sides, the longer one 1."""
    if kind == "circle":
        turns = np.arange(32) / 32
        radii = np.ones(32)
    elif kind == "square":
        turns, radii = np.arange(4) / 4 + 1 / 8, np.ones(4)
    elif kind == "triangle":
        turns, radii = np.arange(3) / 3 - 1 / 4, np.ones(3)
    elif kind == "star":
        turns, radii = np.arange(10) / 10 - 1 / 4, np.tile([1.0, 0.42], 5)
    else:
        raise ValueError(f"kind: unknown shape {kind!r}; known are {', '.join(KINDS)}")
    phase = 2 * np.pi * turns - math.radians(angle)
    points = radii[:, None] * np.stack([np.cos(phase), np.sin(phase)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    sides = (high - low) / (high - low).max()
    return (points - low) / (high - low), (float(sides[0]), float(sides[1]))


def _corners(shape: Shape) -> NDArray[np.float64]:
    """Corner points in the picture, [points, 2]."""
    x0, y0, x1, y1 = shape.box
    points, _ = _outline(shape.kind, shape.angle)
    return points * (x1 - x0, y1 - y0) + (x0, y0)


def draw(scene: Scene) -> Image.Image:
    """Draw the scene, anti-aliased, as an RGB picture of its width and height."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    for shape in scene.shapes:
        _draw_shape(image, shape)
    if scene.sign is not None:
        _draw_sign(image, scene.sign, scene.short)
    return image


def _draw_shape(image: Image.Image, shape: Shape) -> None:
    """Draw the shape's mask at a few times its size, then shrink it: smooth edges at low cost."""
    x0, y0 = math.floor(shape.box[0]), math.floor(shape.box[1])
    w, h = math.ceil(shape.box[2]) - x0, math.ceil(shape.box[3]) - y0
    factor = 4 if max(w, h) <= 100 else 2
    mask = Image.new("L", (w * factor, h * factor))
    pen = ImageDraw.Draw(mask)
    if shape.kind == "circle":
        box = [(v - o) * factor for v, o in zip(shape.box, (x0, y0, x0, y0), strict=True)]
        pen.ellipse((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    else:
        # Pillow's integer coordinates are pixel centres, ours are pixel corners.
        points = (_corners(shape) - (x0, y0)) * factor - 0.5
        pen.polygon(points.ravel().tolist(), fill=255)
    image.paste(shape.shade, (x0, y0), mask.reduce(factor))


def _draw_sign(image: Image.Image, sign: Sign, short: int) -> None:
    pen = ImageDraw.Draw(image)
    x0, y0, x1, y1 = (round(v) for v in sign.box)
    border = max(1, round(0.012 * short))
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(255, 255, 255), outline=sign.ink, width=border)
    font = _font(sign.font, sign.font_size)
    glyphs = _glyphs(sign.font, sign.font_size)
    for letter, box in zip(sign.word, sign.letters, strict=True):
        (left, top, _, _), _ = glyphs[letter]
        pen.text((box[0] - left, box[1] - top), letter, fill=sign.ink, font=font, anchor="ls")


def label_map(
    scene: Scene, rows: int, cols: int, box: Box | None = None, *, oversample: int = 4
) -> NDArray[np.int64]:
    """What stands in each cell of a grid over the picture, int64 [rows, cols].

    Classes: 0 background, 1 + kind * 7 + colour for shapes (in the order of `KINDS` and `COLORS`),
    29 + letter for a letter's box, 55 for the rest of the sign; `NUM_CLASSES` in all. A cell takes
    the class that covers most of it, the background left aside, if that covers at least a quarter
    of the cell (so thin parts are not lost). Share is counted on `oversample` squared points.

    Args:
        box: the region that the grid divides, in the picture's pixels; the whole picture by
            default. What lies outside the picture is background.
    """
    x0, y0, x1, y1 = (0, 0, scene.width, scene.height) if box is None else box
    xs = x0 + (np.arange(cols * oversample) + 0.5) * (x1 - x0) / (cols * oversample)
    ys = y0 + (np.arange(rows * oversample) + 0.5) * (y1 - y0) / (rows * oversample)
    classes = np.zeros((len(ys), len(xs)), dtype=np.int64)

    def fill(filled: Box, label: int, polygon: NDArray[np.float64] | None = None) -> None:
        left, right = np.searchsorted(xs, (filled[0], filled[2]))
        top, bottom = np.searchsorted(ys, (filled[1], filled[3]))
        part = classes[top:bottom, left:right]
        part[... if polygon is None else _inside(polygon, xs[left:right], ys[top:bottom])] = label

    for shape in scene.shapes:
        label = 1 + KINDS.index(shape.kind) * len(COLORS) + COLORS.index(shape.color)
        fill(shape.box, label, _corners(shape))
    if scene.sign is not None:
        fill(scene.sign.box, SIGN_CLASS)
        for letter, letter_box in zip(scene.sign.word, scene.sign.letters, strict=True):
            fill(letter_box, FIRST_LETTER_CLASS + LETTERS.index(letter))
    by_cell = classes.reshape(rows, oversample, cols, oversample).transpose(0, 2, 1, 3)
    points = by_cell.reshape(rows, cols, oversample**2)
    present = np.array([c for c in np.unique(classes) if c], dtype=np.int64)
    if not present.size:
        return np.zeros((rows, cols), dtype=np.int64)
    counts = (points[..., None] == present).sum(axis=2)
    best = counts.argmax(axis=2)
    covered = 4 * counts.max(axis=2) >= oversample**2
    return np.where(covered, present[best], 0)


def _inside(
    polygon: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which points of the grid xs by ys lie in the polygon [points, 2]; bool [ys, xs].

    A point is inside if the ray to its right crosses an odd number of edges.
    """
    ax, ay = polygon.T
    bx, by = np.roll(polygon, -1, axis=0).T
    crosses = (ay > ys[:, None]) != (by > ys[:, None])  # [ys, edges]
    # Level edges cross no ray; their zero height must not divide.
    height = np.where(by == ay, 1.0, by - ay)
    where = ax + (ys[:, None] - ay) * (bx - ax) / height
    hits = crosses[:, None] & (xs[:, None] < where[:, None])  # [ys, xs, edges]
    odd: NDArray[np.bool_] = np.logical_xor.reduce(hits, axis=2)
    return odd


# Questions on one picture


def sample_questions(
    scene: Scene, rng: random.Random, n: int, weights: Mapping[str, float] = DEFAULT_WEIGHTS
) -> list[QA]:
    """Sample `n` different questions, each kind as often as its weight says.

    Kinds that the scene does not allow (the sign where there is none, a colour where no kind is
    alone) give way to the others; a poor scene may have fewer than `n` questions.
    """
    chosen: list[QA] = []
    asked: set[str] = set()
    open_kinds = {kind: weight for kind, weight in weights.items() if weight > 0}
    for _ in range(8 * n):
        if len(chosen) == n or not open_kinds:
            break
        kind = rng.choices(list(open_kinds), list(open_kinds.values()))[0]
        qa = _ASKERS[kind](scene, rng)
        if qa is None:
            del open_kinds[kind]
        elif qa.question not in asked:
            asked.add(qa.question)
            chosen.append(qa)
    return chosen


def questions(scene: Scene, rng: random.Random, kinds: Sequence[str] | None = None) -> list[QA]:
    """One question of each of `kinds` (all by default) that the scene allows."""
    asked = (_ASKERS[kind](scene, rng) for kind in kinds or _ASKERS)
    return [qa for qa in asked if qa is not None]


def _ask(rng: random.Random, wordings: str, answer: str, **slots: str) -> QA:
    question = rng.choice(WORDINGS[wordings]).format(**slots)
    return QA(wordings.split()[0], question, answer)


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _matches(scene: Scene, color: str | None, kind: str | None) -> int:
    """How many shapes have this colour and kind; None stands for any."""
    return sum(color in (None, s.color) and kind in (None, s.kind) for s in scene.shapes)


def caption(scene: Scene) -> str | None:
    """The sentence that describes the scene, or None where left and right are a matter of taste.

    Shapes are named by their centres from left to right; two neighbours in this order must differ
    by 4 % of the shorter side.
    """
    shapes = sorted(scene.shapes, key=lambda s: s.box[0] + s.box[2])
    centers = [(s.box[0] + s.box[2]) / 2 for s in shapes]
    if any(b - a < 0.04 * scene.short for a, b in pairwise(centers)):
        return None
    names = [_a(shape.name) for shape in shapes]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if scene.sign is not None:
        text += f", with a sign that says {scene.sign.word}"
    return f"{text[0].upper()}{text[1:]}."


def _ask_caption(scene: Scene, rng: random.Random) -> QA | None:
    text = caption(scene)
    return None if text is None else _ask(rng, "caption", text)


def _plural(color: str | None, kind: str | None) -> str:
    return f"{color + ' ' if color else ''}{kind or 'shape'}s"


def _ask_count(scene: Scene, rng: random.Random) -> QA:
    shape = rng.choice(scene.shapes)
    form = rng.random()
    absent = rng.random() < 0.2
    color: str | None = None
    kind: str | None = None
    if form >= 0.3:
        if form < 0.65 or form >= 0.93:
            color = rng.choice(COLORS) if absent else shape.color
        if form >= 0.65:
            kind = rng.choice(KINDS) if absent else shape.kind
    answer = str(_matches(scene, color, kind))
    return _ask(rng, "count", answer, things=_plural(color, kind))


def _ask_color(scene: Scene, rng: random.Random) -> QA | None:
    kinds = Counter(shape.kind for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if kinds[shape.kind] == 1]
    if not alone:
        return None
    shape = rng.choice(alone)
    return _ask(rng, "color", shape.color, thing=shape.kind)


def _ask_shape(scene: Scene, rng: random.Random) -> QA | None:
    colors = Counter(shape.color for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if colors[shape.color] == 1]
    if not alone:
        return None
    shape = rng.choice(alone)
    return _ask(rng, "shape", shape.kind, color=shape.color)


def _ask_existence(scene: Scene, rng: random.Random) -> QA:
    """Yes and no equally often; most of the no's name a colour and a kind that are there apart."""
    answer = rng.random() < 0.5
    form = rng.random()
    if form < 0.05 and (scene.sign is not None) == answer:
        return _ask(rng, "existence", "yes" if answer else "no", a_thing="a sign")
    there = {(shape.color, shape.kind) for shape in scene.shapes}
    colors = sorted({color for color, _ in there})
    kinds = sorted({kind for _, kind in there})
    if form < 0.2:
        others = [k for k in KINDS if k not in kinds]
        if answer or others:
            kind = rng.choice(kinds if answer else others)
            return _ask(rng, "existence", "yes" if answer else "no", a_thing=_a(kind))
    elif form < 0.3:
        color = rng.choice(colors if answer else [c for c in COLORS if c not in colors])
        thing = rng.choice((f"anything {color}", _a(f"{color} shape")))
        return _ask(rng, "existence", "yes" if answer else "no", a_thing=thing)
    if answer:
        color, kind = rng.choice(sorted(there))
    else:
        absent = [(c, k) for c in COLORS for k in KINDS if (c, k) not in there]
        apart = [(c, k) for c, k in absent if c in colors and k in kinds]
        half = [(c, k) for c, k in absent if (c in colors) != (k in kinds)]
        hard = apart if apart and rng.random() < 0.6 else half
        color, kind = rng.choice(hard if rng.random() < 0.85 else absent)
    return _ask(rng, "existence", "yes" if answer else "no", a_thing=_a(f"{color} {kind}"))


def lies(other: Box, direction: str, reference: Box, short: int) -> bool | None:
    """Whether `other` lies in `direction` of `reference`; None where people may disagree.

    With `along` and `across` the distances of the centres in and across the direction: yes if the
    boxes are apart in the direction, along >= short / 10 and along >= 1.25 across (within 39
    degrees of the axis); no if along <= across / 2 (at least 63 degrees away), unless the boxes
    are apart in the direction and overlap across it; else None.
    """
    axis, sense = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[direction]
    cross = 1 - axis
    along = sense * (other[axis] + other[axis + 2] - reference[axis] - reference[axis + 2]) / 2
    across = abs(other[cross] + other[cross + 2] - reference[cross] - reference[cross + 2]) / 2
    near, far = (other, reference) if sense > 0 else (reference, other)
    apart = near[axis] >= far[axis + 2]
    if apart and along >= 0.1 * short and along >= 1.25 * across:
        return True
    facing = other[cross] < reference[cross + 2] and reference[cross] < other[cross + 2]
    if along <= across / 2 and not (apart and facing):
        return False
    return None


def places(scene: Scene) -> list[tuple[str, str, str]]:
    """All (reference, direction, answer) of which a place question may be asked.

    The reference has a name of its own (`red star`, also `star` if it is the only one, or `sign`);
    the answer is the only thing that lies in the direction, or `nothing`. Left out is what is open
    to dispute: a thing that neither clearly lies nor clearly does not lie there, or two that do.
    """
    things = [(shape.name, shape.box) for shape in scene.shapes]
    if scene.sign is not None:
        things.append(("sign", scene.sign.box))
    names = Counter(name for name, _ in things)
    kinds = Counter(shape.kind for shape in scene.shapes)
    found = []
    for i, (name, box) in enumerate(things):
        if names[name] > 1:
            continue
        others = things[:i] + things[i + 1 :]
        calls = [name]
        if name != "sign" and kinds[kind := name.split()[1]] == 1:
            calls.append(kind)
        for direction in DIRECTIONS:
            where = [lies(other, direction, box, scene.short) for _, other in others]
            there = [other for (other, _), yes in zip(others, where, strict=True) if yes]
            if None in where or len(there) > 1 or not others:
                continue
            found += [(call, direction, there[0] if there else "nothing") for call in calls]
    return found


def _ask_place(scene: Scene, rng: random.Random) -> QA | None:
    found = places(scene)
    full = [place for place in found if place[2] != "nothing"]
    if not full:
        return None
    empty = [place for place in found if place[2] == "nothing"]
    reference, direction, answer = rng.choice(empty if empty and rng.random() < 0.1 else full)
    # "Which shape" asks for no sign.
    wordings = [w for w in WORDINGS["place"] if answer != "sign" or " shape " not in w]
    words = rng.choice(_DIRECTION_WORDS[direction])
    question = rng.choice(wordings).format(direction=words, thing=reference)
    return QA("place", question, answer)


def _ask_sign(scene: Scene, rng: random.Random) -> QA | None:
    return None if scene.sign is None else _ask(rng, "sign", scene.sign.word)


_ASKERS: Mapping[str, Callable[[Scene, random.Random], QA | None]] = {
    "caption": _ask_caption,
    "count": _ask_count,
    "color": _ask_color,
    "shape": _ask_shape,
    "existence": _ask_existence,
    "place": _ask_place,
    "sign": _ask_sign,
}


# Questions on two pictures


def sample_pair(
    rng: random.Random,
    fonts: Sequence[Path],
    level: float,
    n: int = 3,
    *,
    related: float = 0.5,
    wordings: int = 1,
) -> tuple[Scene, Scene, list[QA]]:
    """Sample two scenes and 1 to `n` questions of kind `pair` on them.

    Three pairs in ten show the same scene, perhaps at another size; two in ten differ in one thing
    (a colour, a kind, a shape less, another word); the others have nothing to do with each other.
    "The same?" is asked so that yes and no are equally frequent.

    related: the share of the first two sorts, if not half. wordings: of "the same?", at most.
    """

    first = sample_scene(rng, fonts, level=level)
    kind = rng.random() * 0.5 / related
    if kind < 0.3:
        return first, _resized(first, rng), ask_same(rng, "yes", wordings)
    if kind < 0.5:
        second = _edited(first, rng)
        if rng.random() < 0.5:
            first, second = second, first
        if rng.random() < 0.5:
            second = _resized(second, rng)
    else:
        second = sample_scene(rng, fonts, level=level)
    doubtful = kind < 0.5 or not compare(first, second) or rng.random() < 0.2
    return first, second, ask_pair(rng, first, second, n, wordings if doubtful else 0)


def sample_family(
    rng: random.Random, fonts: Sequence[Path], level: float
) -> tuple[tuple[Scene, Scene], tuple[Scene, Scene]]:
    """Sample a scene and what differs from it in one thing, each also at another size."""
    scene = sample_scene(rng, fonts, level=level)
    edited = _edited(scene, rng)
    return (scene, _rescaled(scene, rng)), (edited, _rescaled(edited, rng))


def ask_same(rng: random.Random, answer: str, wordings: int) -> list[QA]:
    """Whether two scenes are the same, in at most so many wordings."""
    return list(dict.fromkeys(_ask(rng, "pair same", answer) for _ in range(wordings)))


def ask_pair(rng: random.Random, first: Scene, second: Scene, n: int, same: int) -> list[QA]:
    """1 to `n` questions on two scenes that differ, `same` of them whether they are the same."""
    pool = compare(first, second)
    chosen = ask_same(rng, "no", same) if _differ(first, second) else []
    if pool:
        # Each form of question gets its share, however many things it can name.
        by_form: dict[str, list[tuple[str, str, str]]] = {}
        for entry in pool:
            by_form.setdefault(entry[0], []).append(entry)
        for _ in range(n - len(chosen)):
            form, slot, answer = rng.choice(by_form[rng.choice(list(by_form))])
            name = "a_thing" if form == "pair has" else "things"
            qa = _ask(rng, form, answer, **{name: slot})
            if qa not in chosen:
                chosen.append(qa)
    return chosen or ask_same(rng, "no", max(1, same))


def ask_difference(first: Scene, second: Scene) -> list[QA]:
    """What either scene shows and the other does not, where that is one thing at most.

    Of a kind of its own, "difference": the demo is trained on it but not judged by it.
    """
    asked = []
    for one, other, question in (
        (first, second, "What is in the first image, not in the second?"),
        (second, first, "What is in the second image, not in the first?"),
    ):
        found = list((_content(one) - _content(other)).elements())
        if len(found) <= 1:
            asked.append(QA("difference", question, found[0] if found else "nothing"))
    return asked


def compare(first: Scene, second: Scene) -> list[tuple[str, str, str]]:
    """All (wordings, thing, answer) that tell the two scenes apart by what they hold."""
    found = []
    shapes = first.shapes + second.shapes
    wanted: list[tuple[str | None, str | None]] = [(None, None)]
    wanted += [(color, None) for color in COLORS if any(s.color == color for s in shapes)]
    wanted += [(None, kind) for kind in KINDS if any(s.kind == kind for s in shapes)]
    for color, kind in wanted:
        a, b = _matches(first, color, kind), _matches(second, color, kind)
        if a != b:
            things = _plural(color, kind)
            found.append(("pair more", things, "first" if a > b else "second"))
            found.append(("pair fewer", things, "first" if a < b else "second"))
            if kind and not (a and b):
                found.append(("pair has", _a(kind), "first" if a else "second"))
    for name in sorted({shape.name for shape in shapes}):
        in_first = any(shape.name == name for shape in first.shapes)
        if in_first != any(shape.name == name for shape in second.shapes):
            found.append(("pair has", _a(name), "first" if in_first else "second"))
    if (first.sign is None) != (second.sign is None):
        found.append(("pair has", "a sign", "second" if first.sign is None else "first"))
    return found


def _differ(first: Scene, second: Scene) -> bool:
    return _content(first) != _content(second)


def _content(scene: Scene) -> Counter[str]:
    """The names of the shapes, and the word of the sign."""
    content = Counter(shape.name for shape in scene.shapes)
    if scene.sign is not None:
        content[scene.sign.word] = 1
    return content


def _resized(scene: Scene, rng: random.Random) -> Scene:
    """The same scene, in half of the cases at another size."""
    return scene if rng.random() < 0.5 else _rescaled(scene, rng)


def _rescaled(scene: Scene, rng: random.Random) -> Scene:
    """The same scene at another size."""
    low = MIN_SIDE / scene.short
    high = MAX_SIDE / max(scene.width, scene.height)
    factor = rng.uniform(max(low, 0.6), min(high, 1.6))
    # Rounded so that neither a bound nor the largest aspect is passed.
    long = min(MAX_SIDE, max(MIN_SIDE, math.floor(max(scene.width, scene.height) * factor)))
    short = min(MAX_SIDE, max(MIN_SIDE, math.ceil(scene.short * factor)))
    width, height = (long, short) if scene.width >= scene.height else (short, long)
    fx, fy = width / scene.width, height / scene.height

    def scaled(box: Box) -> Box:
        return box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy

    sign = scene.sign
    if sign is not None:
        _, top, _, bottom = _bounds(sign.letters)
        box = scaled(sign.box)
        sign = _fit_sign(sign.word, sign.font, box, (bottom - top) * fy, sign.ink)
    shapes = tuple(replace(shape, box=scaled(shape.box)) for shape in scene.shapes)
    return replace(scene, width=width, height=height, shapes=shapes, sign=sign)


def _edited(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one thing changed: a colour, a kind, a shape less, or another word."""
    edits = ["color", "kind"]
    if len(scene.shapes) > 1:
        edits.append("remove")
    if scene.sign is not None:
        edits.append("word")
    edit = rng.choice(edits)
    i = rng.randrange(len(scene.shapes))
    shape = scene.shapes[i]
    rest = scene.shapes[:i], scene.shapes[i + 1 :]
    if edit == "remove":
        return replace(scene, shapes=rest[0] + rest[1])
    if edit == "word" and scene.sign is not None:
        sign = scene.sign
        _, top, _, bottom = _bounds(sign.letters)
        word = sign.word
        while word == sign.word:
            word = sample_word(rng)
        sign = _fit_sign(word, sign.font, sign.box, bottom - top, sign.ink)
        return replace(scene, sign=sign)
    if edit == "kind":
        kind = rng.choice([k for k in KINDS if k != shape.kind])
        x0, y0, x1, y1 = shape.box
        sides = _outline(kind, 0.0)[1]
        # As large as fits the old place, so that it overlaps nothing.
        extent = min((x1 - x0) / sides[0], (y1 - y0) / sides[1])
        w, h = extent * sides[0], extent * sides[1]
        if min(w, h) >= _SMALLEST * scene.short:
            x, y = (x0 + x1 - w) / 2, (y0 + y1 - h) / 2
            changed = replace(shape, kind=kind, box=(x, y, x + w, y + h), angle=0.0)
            return replace(scene, shapes=(*rest[0], changed, *rest[1]))
    color = rng.choice([c for c in COLORS if c != shape.color])
    changed = replace(shape, color=color, shade=_shade(rng, color))
    return replace(scene, shapes=(*rest[0], changed, *rest[1]))


# The whole world


def vocabulary() -> list[str]:
    """Lines that hold every wording and answer, to train a tokenizer on.

    Sign words are there letter by letter only: one that is a token of its own would be remembered
    instead of read.
    """
    names = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    things = [_plural(None, None)]
    things += [_plural(color, None) for color in COLORS] + [_plural(None, kind) for kind in KINDS]
    singular = [*names, *KINDS, "sign"]
    with_article = [_a(name) for name in singular]
    with_article += [f"anything {color}" for color in COLORS]
    with_article += [_a(f"{color} shape") for color in COLORS]
    directions = [words for group in _DIRECTION_WORDS.values() for words in group]
    slots: Mapping[str, Sequence[str]] = {
        "things": things,
        "thing": singular,
        "a_thing": with_article,
        "color": COLORS,
        "direction": directions,
    }
    lines: list[str] = []
    for wordings in WORDINGS.values():
        for wording in wordings:
            used = [slot for slot in slots if f"{{{slot}}}" in wording]
            # Every filler once is enough; the fillers of two slots go round together.
            for i in range(max([len(slots[slot]) for slot in used], default=1)):
                lines.append(
                    wording.format(**{slot: slots[slot][i % len(slots[slot])] for slot in used})
                )
    lines += [*names, *COLORS, *KINDS, "sign", "nothing", "yes", "no", "first", "second"]
    lines += [str(i) for i in range(5)]
    for i, name in enumerate(names):
        other = names[(i + 9) % len(names)]
        lines += [f"{_a(name).capitalize()}, {_a(other)} and {_a(name)}."]
        lines += [f"{_a(name).capitalize()}, with a sign that says"]
    return lines + list(LETTERS)


def evaluation_set(seed: int, fonts: Sequence[Path], n: int = 500) -> list[Case]:
    """The questions by which a checkpoint is judged; equal seed and fonts give equal sets.

    `n` scenes of the whole world (level 1), three in five with a sign, each with every kind of
    question that it allows: two counts, two on existence, two places, one of the others; then
    3/5 n pairs with one or two questions each. With n = 500 every kind has at least 300 questions.
    """
    rng = random.Random(seed)
    cases: list[Case] = []
    for i in range(n):
        scene = sample_scene(rng, fonts, level=1.0, with_sign=i % 5 < 3)
        asked = questions(scene, rng) + questions(scene, rng, ("count", "existence", "place"))
        for qa in dict.fromkeys(asked):
            cases.append(Case((scene,), qa.kind, qa.question, qa.answer))
    for _ in range(n * 3 // 5):
        first, second, asked = sample_pair(rng, fonts, 1.0, n=2)
        cases += [Case((first, second), qa.kind, qa.question, qa.answer) for qa in asked]
    return cases
