"""Signs: their words, and the layout of a word's letters in a box."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from scripts.demo_model.fonts import load_font
from scripts.demo_model.scene import LETTERS, Box, Rgb, Sign, bounds

INKS: tuple[Rgb, ...] = ((0, 0, 0), (20, 20, 20), (45, 45, 50), (15, 25, 60), (60, 20, 20))

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

_FIT_SIZE = 100  # font size at which words are measured


def sample_word(rng: random.Random) -> str:
    """Sample a word of 3 to 5 letters.

    Half are common words; the others are made up, so that reading letters is the only way to
    answer what a sign says.
    """
    draw_kind = rng.random()
    if draw_kind < 0.5:
        return rng.choice(COMMON_WORDS)
    length = rng.randint(3, 5)
    if draw_kind < 0.7:
        vowels, consonants = "AEIOUY", "BCDFGHJKLMNPQRSTVWXZ"
        start = rng.randrange(2)
        return "".join(rng.choice((vowels, consonants)[(start + i) % 2]) for i in range(length))
    return "".join(rng.choices(LETTERS, k=length))


def sample_sign(
    rng: random.Random, fonts: Sequence[Path], width: int, height: int, level: float
) -> Sign:
    """Sample a sign whose letters are at least about a seventh of the shorter side high."""
    word = sample_word(rng)
    path = rng.choice(fonts)
    short = min(width, height)
    text_w, text_h = text_extent(word, path)
    tallest = min(0.34 * short, 0.86 * width * text_h / text_w)
    # Wide images get higher letters, to stay legible when squeezed to one square tile.
    lowest = min(tallest, (0.16 + 0.08 * (1 - level)) * math.sqrt(width * height))
    letter_height = rng.uniform(lowest, tallest)
    pad_x, pad_y = rng.uniform(0.3, 0.6) * letter_height, rng.uniform(0.3, 0.6) * letter_height
    box_w = min(width - 2, letter_height * text_w / text_h + 2 * pad_x)
    box_h = letter_height + 2 * pad_y
    x = rng.uniform(1, width - 1 - box_w)
    y = rng.uniform(1, height - 1 - box_h)
    ink = rng.choice(INKS)
    return fit_sign(word, path, (x, y, x + box_w, y + box_h), letter_height, ink)


def fit_sign(word: str, path: Path, box: Box, letter_height: float, ink: Rgb) -> Sign:
    """Centre the word in the box, `letter_height` high or lower where the box is too narrow."""
    text_w, text_h = text_extent(word, path)
    scale = min(letter_height / text_h, 0.92 * (box[2] - box[0]) / text_w)
    size = max(6, int(_FIT_SIZE * scale))
    letters = _letter_boxes(word, path, size)
    x0, y0, x1, y1 = bounds(letters)
    dx = round((box[0] + box[2] - x0 - x1) / 2)
    dy = round((box[1] + box[3] - y0 - y1) / 2)
    moved = tuple((a + dx, b + dy, c + dx, d + dy) for a, b, c, d in letters)
    return Sign(word, box, moved, path, size, ink)


def letters_height(sign: Sign) -> float:
    """The height of the sign's word in pixels."""
    _, top, _, bottom = bounds(sign.letters)
    return bottom - top


def text_extent(word: str, path: Path) -> tuple[float, float]:
    """Width and height of the word in pixels, at a fixed font size."""
    x0, y0, x1, y1 = bounds(_letter_boxes(word, path, _FIT_SIZE))
    return x1 - x0, y1 - y0


@lru_cache(maxsize=4096)
def glyphs(path: Path, size: int) -> dict[str, tuple[Box, float]]:
    """Each capital's tight box relative to the pen on the baseline, and its advance."""
    font = load_font(path, size)
    return {c: (font.getbbox(c, anchor="ls"), font.getlength(c)) for c in LETTERS}


def _letter_boxes(word: str, path: Path, size: int) -> list[Box]:
    """Tight boxes of the letters, slightly letter-spaced, with the first pen at the origin."""
    measured = glyphs(path, size)
    pen = 0.0
    boxes: list[Box] = []
    for letter in word:
        (x0, y0, x1, y1), advance = measured[letter]
        boxes.append((pen + x0, y0, pen + x1, y1))
        pen += advance + 0.05 * size
    return boxes
