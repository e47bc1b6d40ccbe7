"""Questions on one image, with their answers."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from scripts.demo_model.placement import places
from scripts.demo_model.scene import COLORS, KINDS, Scene
from scripts.demo_model.wordings import (
    DIRECTION_WORDS,
    QA,
    WORDINGS,
    plural,
    with_article,
    word_question,
)

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "caption": 1.0,
    "count": 1.5,
    "color": 1.0,
    "shape": 1.0,
    "existence": 1.0,
    "place": 2.0,
    "sign": 1.5,
}


def sample_questions(
    scene: Scene, rng: random.Random, n: int, weights: Mapping[str, float] = DEFAULT_WEIGHTS
) -> list[QA]:
    """Sample `n` different questions of kinds that are as frequent as their weights.

    Kinds that the scene does not allow (a sign where there is none, a colour where every kind is
    repeated) are replaced by others; a simple scene may have fewer than `n` questions.
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
    """One question of each of `kinds` (by default all) that the scene allows."""
    asked = (_ASKERS[kind](scene, rng) for kind in kinds or _ASKERS)
    return [qa for qa in asked if qa is not None]


def count_shapes(scene: Scene, color: str | None, kind: str | None) -> int:
    """How many shapes have this colour and kind; None matches any."""
    return sum(color in (None, s.color) and kind in (None, s.kind) for s in scene.shapes)


def caption(scene: Scene) -> str | None:
    """The sentence that describes the scene, or None where the order of shapes is ambiguous.

    Shapes are named from left to right by their centres; neighbours in this order must be at
    least 4 % of the shorter side apart.
    """
    shapes = sorted(scene.shapes, key=lambda s: s.box[0] + s.box[2])
    centers = [(s.box[0] + s.box[2]) / 2 for s in shapes]
    if any(b - a < 0.04 * scene.short for a, b in pairwise(centers)):
        return None
    names = [with_article(shape.name) for shape in shapes]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if scene.sign is not None:
        text += f", with a sign that says {scene.sign.word}"
    return f"{text[0].upper()}{text[1:]}."


def _ask_caption(scene: Scene, rng: random.Random) -> QA | None:
    text = caption(scene)
    return None if text is None else word_question(rng, "caption", text)


def _ask_count(scene: Scene, rng: random.Random) -> QA:
    """Ask for the number of all shapes, of those of a colour, of a kind, or of both."""
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
    answer = str(count_shapes(scene, color, kind))
    return word_question(rng, "count", answer, things=plural(color, kind))


def _ask_color(scene: Scene, rng: random.Random) -> QA | None:
    kinds = Counter(shape.kind for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if kinds[shape.kind] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    return word_question(rng, "color", shape.color, thing=shape.kind)


def _ask_shape(scene: Scene, rng: random.Random) -> QA | None:
    colors = Counter(shape.color for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if colors[shape.color] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    return word_question(rng, "shape", shape.kind, color=shape.color)


def _ask_existence(scene: Scene, rng: random.Random) -> QA:
    """Ask for what is there and for what is not, equally often."""
    exists = rng.random() < 0.5
    form = rng.random()
    a_thing = _sample_thing(scene, rng, form, exists=exists)
    return word_question(rng, "existence", "yes" if exists else "no", a_thing=a_thing)


def _sample_thing(scene: Scene, rng: random.Random, form: float, *, exists: bool) -> str:
    """A phrase for something that the scene shows, or does not.

    form: from 0 to 1, chooses among a sign, a kind, a colour, or a colour and a kind.
    """
    if form < 0.05 and (scene.sign is not None) == exists:
        return "a sign"
    present = {(shape.color, shape.kind) for shape in scene.shapes}
    colors = sorted({color for color, _ in present})
    kinds = sorted({kind for _, kind in present})
    if form < 0.2:
        others = [k for k in KINDS if k not in kinds]
        if exists or others:
            return with_article(rng.choice(kinds if exists else others))
    elif form < 0.3:
        color = rng.choice(colors if exists else [c for c in COLORS if c not in colors])
        return rng.choice((f"anything {color}", with_article(f"{color} shape")))
    if exists:
        color, kind = rng.choice(sorted(present))
    else:
        # Most questions are hard: colour and kind are both there, but apart, or one of them is.
        absent = [(c, k) for c in COLORS for k in KINDS if (c, k) not in present]
        apart = [(c, k) for c, k in absent if c in colors and k in kinds]
        half = [(c, k) for c, k in absent if (c in colors) != (k in kinds)]
        hard = apart if apart and rng.random() < 0.6 else half
        color, kind = rng.choice(hard if rng.random() < 0.85 else absent)
    return with_article(f"{color} {kind}")


def _ask_place(scene: Scene, rng: random.Random) -> QA | None:
    found = places(scene)
    full = [place for place in found if place[2] != "nothing"]
    if not full:
        return None
    empty = [place for place in found if place[2] == "nothing"]
    reference, direction, answer = rng.choice(empty if empty and rng.random() < 0.1 else full)
    # A sign is no shape, so it cannot answer "Which shape".
    wordings = [w for w in WORDINGS["place"] if answer != "sign" or " shape " not in w]
    words = rng.choice(DIRECTION_WORDS[direction])
    question = rng.choice(wordings).format(direction=words, thing=reference)
    return QA("place", question, answer)


def _ask_sign(scene: Scene, rng: random.Random) -> QA | None:
    return None if scene.sign is None else word_question(rng, "sign", scene.sign.word)


_ASKERS: Mapping[str, Callable[[Scene, random.Random], QA | None]] = {
    "caption": _ask_caption,
    "count": _ask_count,
    "color": _ask_color,
    "shape": _ask_shape,
    "existence": _ask_existence,
    "place": _ask_place,
    "sign": _ask_sign,
}
