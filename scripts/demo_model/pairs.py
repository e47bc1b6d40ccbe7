"""Pairs of scenes, and questions that compare them."""

import random
from collections.abc import Sequence
from pathlib import Path

from scripts.demo_model.edits import content, edited, maybe_rescaled, rescaled
from scripts.demo_model.questions import count_shapes
from scripts.demo_model.sampling import sample_scene
from scripts.demo_model.scene import COLORS, KINDS, Scene
from scripts.demo_model.wordings import QA, plural, with_article, word_question


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

    Three pairs in ten show the same scene, perhaps at another size; two in ten differ in one thing;
    the others are unrelated. "The same?" has the answers yes and no equally often.

    Args:
        related: the share of pairs that are the same or differ in one thing.
        wordings: how many wordings of "the same?" a pair has at most.
    """
    first = sample_scene(rng, fonts, level=level)
    relation = rng.random() * 0.5 / related
    if relation < 0.3:
        return first, maybe_rescaled(first, rng), ask_same(rng, "yes", wordings)
    if relation < 0.5:
        second = edited(first, rng)
        if rng.random() < 0.5:
            first, second = second, first
        if rng.random() < 0.5:
            second = maybe_rescaled(second, rng)
    else:
        second = sample_scene(rng, fonts, level=level)
    asks_same = relation < 0.5 or not compare(first, second) or rng.random() < 0.2
    return first, second, ask_pair(rng, first, second, n, wordings if asks_same else 0)


def sample_family(
    rng: random.Random, fonts: Sequence[Path], level: float
) -> tuple[tuple[Scene, Scene], tuple[Scene, Scene]]:
    """Sample a scene and a variant that differs in one thing, each also at another size."""
    scene = sample_scene(rng, fonts, level=level)
    variant = edited(scene, rng)
    return (scene, rescaled(scene, rng)), (variant, rescaled(variant, rng))


def ask_same(rng: random.Random, answer: str, wordings: int) -> list[QA]:
    """Whether two scenes are the same, in at most `wordings` wordings."""
    return list(dict.fromkeys(word_question(rng, "pair same", answer) for _ in range(wordings)))


def ask_pair(rng: random.Random, first: Scene, second: Scene, n: int, same: int) -> list[QA]:
    """1 to `n` questions on two different scenes, `same` of them whether they are the same."""
    differences = compare(first, second)
    chosen = ask_same(rng, "no", same) if content(first) != content(second) else []
    if differences:
        # Forms are equally frequent, however many things each can name.
        by_form: dict[str, list[tuple[str, str, str]]] = {}
        for difference in differences:
            by_form.setdefault(difference[0], []).append(difference)
        for _ in range(n - len(chosen)):
            form, thing, answer = rng.choice(by_form[rng.choice(list(by_form))])
            slot = "a_thing" if form == "pair has" else "things"
            qa = word_question(rng, form, answer, **{slot: thing})
            if qa not in chosen:
                chosen.append(qa)
    return chosen or ask_same(rng, "no", max(1, same))


def ask_difference(first: Scene, second: Scene) -> list[QA]:
    """What one scene shows and the other does not, asked where that is at most one thing.

    The kind, "difference", is used in training only.
    """
    asked = []
    for one, other, question in (
        (first, second, "What is in the first image, not in the second?"),
        (second, first, "What is in the second image, not in the first?"),
    ):
        found = list((content(one) - content(other)).elements())
        if len(found) <= 1:
            asked.append(QA("difference", question, found[0] if found else "nothing"))
    return asked


def compare(first: Scene, second: Scene) -> list[tuple[str, str, str]]:
    """All (wordings, thing, answer) about which the content of two scenes differs."""
    found = []
    shapes = first.shapes + second.shapes
    wanted: list[tuple[str | None, str | None]] = [(None, None)]
    wanted += [(color, None) for color in COLORS if any(s.color == color for s in shapes)]
    wanted += [(None, kind) for kind in KINDS if any(s.kind == kind for s in shapes)]
    for color, kind in wanted:
        a, b = count_shapes(first, color, kind), count_shapes(second, color, kind)
        if a != b:
            things = plural(color, kind)
            found.append(("pair more", things, "first" if a > b else "second"))
            found.append(("pair fewer", things, "first" if a < b else "second"))
            if kind and not (a and b):
                found.append(("pair has", with_article(kind), "first" if a else "second"))
    for name in sorted({shape.name for shape in shapes}):
        in_first = any(shape.name == name for shape in first.shapes)
        if in_first != any(shape.name == name for shape in second.shapes):
            found.append(("pair has", with_article(name), "first" if in_first else "second"))
    if (first.sign is None) != (second.sign is None):
        found.append(("pair has", "a sign", "second" if first.sign is None else "first"))
    return found
