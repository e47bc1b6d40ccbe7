"""Questions on a clip, with their answers.

The shipped weights were trained on these texts: changing one means training again.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from scripts.demo_model.scene import Shape
from scripts.demo_model.wordings import QA
from scripts.demo_video.clip import APPEARS, DISAPPEARS, MOVES, TURNS, Clip, Event

QUESTION_KINDS = ("direction", "appearance", "color", "order", "count")

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "direction": (
        "Which way does the {thing} move?",
        "Which direction does the {thing} move?",
        "Which way does the {thing} go?",
        "Where does the {thing} move?",
    ),
    APPEARS: ("What appears?", "Which shape appears?", "What shape appears?"),
    DISAPPEARS: ("What disappears?", "Which shape disappears?", "What shape disappears?"),
    "change": (
        "What changes color?",
        "What changes color and into what?",
        "Which shape changes color?",
        "What changes colour?",
    ),
    "into": (
        "What color does the {thing} turn?",
        "What color does the {thing} become?",
        "Which color does the {thing} turn into?",
        "What colour does the {thing} turn?",
    ),
    "first": ("What happens first?", "What is the first thing that happens?"),
    "last": ("What happens last?", "What is the last thing that happens?"),
    "end": (
        "How many shapes are there at the end?",
        "How many shapes are left at the end?",
        "How many shapes do you see at the end?",
    ),
    "start": ("How many shapes are there at the start?", "How many shapes do you see at first?"),
}

# How often each form is asked in the training.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "direction": 2.0,
    APPEARS: 1.0,
    DISAPPEARS: 1.0,
    "change": 1.0,
    "into": 1.0,
    "first": 1.5,
    "last": 1.0,
    "end": 1.2,
    "start": 0.6,
}
_KIND_OF = {
    "direction": "direction",
    APPEARS: "appearance",
    DISAPPEARS: "appearance",
    "change": "color",
    "into": "color",
    "first": "order",
    "last": "order",
    "end": "count",
    "start": "count",
}


def sample_questions(
    clip: Clip, rng: random.Random, n: int, weights: Mapping[str, float] = DEFAULT_WEIGHTS
) -> list[QA]:
    """Sample at most `n` different questions, of forms that are as frequent as their weights.

    No form is asked more than twice on one clip, and few questions have the answer "nothing".
    """
    possible = {form: found for form in weights if (found := ask_all(clip, form))}
    for form in (APPEARS, DISAPPEARS):
        if possible[form][0].answer == "nothing" and rng.random() < 0.7:
            del possible[form]
    slots = [form for form in possible for _ in range(2)]
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006).
    slots.sort(key=lambda form: rng.random() ** (1 / weights[form]), reverse=True)
    chosen = [rng.choice(possible[form]) for form in slots[:n]]
    return list(dict.fromkeys(chosen))


def questions(clip: Clip, rng: random.Random) -> list[QA]:
    """One question of each of `QUESTION_KINDS` that the clip allows; none on starts and ends."""
    asked = []
    for kind in QUESTION_KINDS:
        forms = [form for form in _KIND_OF if _KIND_OF[form] == kind]
        if kind == "order":
            forms = ["first"]
        elif kind == "count":
            forms = ["end"]
        elif kind == "appearance" and rng.random() < 0.9:
            # "nothing" is the answer to few questions.
            happening = {event.kind for _, event in clip.events}
            forms = [form for form in forms if form in happening]
        possible = [qa for form in forms for qa in ask_all(clip, form)]
        if possible:
            asked.append(rng.choice(possible))
    return asked


def ask_all(clip: Clip, form: str) -> list[QA]:
    """Every wording of every question of a form that the clip allows."""
    answers = _answers(clip, form)
    return [
        QA(_KIND_OF[form], wording.format(thing=thing), answer)
        for thing, answer in answers
        for wording in WORDINGS[form]
    ]


def _answers(clip: Clip, form: str) -> list[tuple[str, str]]:
    """The things that questions of this form may ask about, with their answers."""
    events = clip.events
    if form == "direction":
        moves = [(shape, event) for shape, event in events if event.kind == MOVES]
        return [(name, event.direction) for shape, event in moves for name in _names(clip, shape)]
    if form == "into":
        turns = [(shape, event) for shape, event in events if event.kind == TURNS]
        return [(name, event.color) for shape, event in turns for name in _names(clip, shape)]
    if form == "change":
        return [("", describe(*pair)) for pair in events if pair[1].kind == TURNS]
    if form in (APPEARS, DISAPPEARS):
        found = [shape.name for shape, event in events if event.kind == form]
        return [("", found[0] if found else "nothing")]
    if form in ("first", "last"):
        return [("", describe(*events[0 if form == "first" else -1]))] if len(events) > 1 else []
    return [("", str(len(clip.scene(1.0 if form == "end" else 0.0).shapes)))]


def describe(shape: Shape, event: Event) -> str:
    """The event as an answer: `the red star moves`, `the red star turns blue`."""
    return " ".join(["the", shape.name, event.kind, *([event.color] if event.color else [])])


def _names(clip: Clip, shape: Shape) -> Sequence[str]:
    """What a question may call the shape: its color and kind, or its kind if no other has it."""
    kinds = Counter(actor.shape.kind for actor in clip.actors)
    return [shape.name, shape.kind] if kinds[shape.kind] == 1 else [shape.name]
