"""The wordings of questions, and the phrases that fill them.

The demo's tokenizer and weights were trained on these texts: changing one means training again.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.demo_model.scene import COLORS, KINDS, LETTERS

QUESTION_KINDS = ("caption", "count", "color", "shape", "existence", "place", "sign", "pair")

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
DIRECTION_WORDS: Mapping[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class QA:
    """A question of one of `QUESTION_KINDS` and its only right answer."""

    kind: str
    question: str
    answer: str


def word_question(rng: random.Random, wordings: str, answer: str, **slots: str) -> QA:
    """A question in a random one of `WORDINGS[wordings]`, filled with `slots`."""
    question = rng.choice(WORDINGS[wordings]).format(**slots)
    return QA(wordings.split()[0], question, answer)


def with_article(name: str) -> str:
    """`a red star`, `an orange star`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(color: str | None, kind: str | None) -> str:
    """`red stars`, `red shapes`, `stars` or `shapes`."""
    return f"{color + ' ' if color else ''}{kind or 'shape'}s"


def vocabulary() -> list[str]:
    """Lines that contain every wording and answer, to train a tokenizer on.

    Words of signs appear as single letters only: the model would memorise a word that is one
    token instead of reading it.
    """
    names = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    slots = _slot_fillers(names)
    lines: list[str] = []
    for wordings in WORDINGS.values():
        for wording in wordings:
            used = [slot for slot in slots if f"{{{slot}}}" in wording]
            # Each filler once is enough; where there are two slots, both advance together.
            for i in range(max([len(slots[slot]) for slot in used], default=1)):
                lines.append(
                    wording.format(**{slot: slots[slot][i % len(slots[slot])] for slot in used})
                )
    lines += [*names, *COLORS, *KINDS, "sign", "nothing", "yes", "no", "first", "second"]
    lines += [str(i) for i in range(5)]
    for i, name in enumerate(names):
        other = names[(i + 9) % len(names)]
        first = with_article(name)
        lines.append(f"{first.capitalize()}, {with_article(other)} and {first}.")
        lines.append(f"{first.capitalize()}, with a sign that says")
    return lines + list(LETTERS)


def _slot_fillers(names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Everything that may fill each slot of a wording; `names` are those of shapes."""
    things = [plural(None, None)]
    things += [plural(color, None) for color in COLORS] + [plural(None, kind) for kind in KINDS]
    singular = [*names, *KINDS, "sign"]
    a_thing = [with_article(name) for name in singular]
    a_thing += [f"anything {color}" for color in COLORS]
    a_thing += [with_article(f"{color} shape") for color in COLORS]
    return {
        "things": things,
        "thing": singular,
        "a_thing": a_thing,
        "color": COLORS,
        "direction": [words for group in DIRECTION_WORDS.values() for words in group],
    }
