"""Inputs at random, each valid by itself, as cog-safe-push and people who try out the form send."""

import base64
import io
import json
from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Any

from PIL import Image

from tests.support.paths import DEMO, ROOT
from tests.support.server import data_url

IMAGES = [data_url(file) for file in sorted((DEMO / "examples").glob("*.png"))]


def _gif() -> str:
    """A clip of five frames in one second, as a data URL."""
    frames = [Image.new("RGB", (32, 32), (40 * index, 0, 0)) for index in range(5)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=200)
    return f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"


CLIP = _gif()
USER = {"role": "user", "content": "What color is the star?"}
ASSISTANT = {"role": "assistant", "content": "orange"}
SYSTEM = {"role": "system", "content": "Answer in one word."}
COLOR = {"type": "object", "properties": {"color": {"type": "string", "maxLength": 9}}}
MOST_TOKENS = 100  # so that no answer takes long

VALUES: dict[str, Callable[[Random], Any]] = {
    "image": lambda random: random.choice(IMAGES),
    "images": lambda random: random.choices(IMAGES, k=random.randint(0, 3)),
    "video": lambda random: CLIP,
    "num_frames": lambda random: random.randint(1, 3),
    "start": lambda random: random.choice([0, 0.1]),
    "end": lambda random: random.choice([0.7, 1, 3600]),
    "question": lambda random: random.choice(["", "What is this?", "How many circles are there?"]),
    "system_prompt": lambda random: random.choice(["", "Answer in one word."]),
    "max_new_tokens": lambda random: random.randint(1, MOST_TOKENS),
    "stop_sequences": lambda random: random.choice([[], ["\n"], ["END", "."]]),
    "seed": lambda random: random.choice([0, 42, 2**32]),
    "messages": lambda random: random.choice(
        [[], [USER, ASSISTANT], [USER], [USER, ASSISTANT, USER], [SYSTEM, USER]]
    ),
    "choices": lambda random: random.choice([["yes", "no"], ["red", "orange", "yellow circle"]]),
    "json_schema": lambda random: random.choice([{}, COLOR]),
}
"""A value for each input that the form does not bound."""


def form_inputs(
    random: Random, fixed: Mapping[str, Any] | None = None, disabled: Collection[str] = ()
) -> dict[str, Any]:
    """Give each input with a probability of 1/2 some value that it allows.

    fixed: inputs that have this value. disabled: inputs without a value.
    """
    schema = json.loads((ROOT / "openapi.json").read_text())["components"]["schemas"]["Input"]
    inputs = {
        name: VALUES[name](random) if name in VALUES else _number(random, field)
        for name, field in schema["properties"].items()
        if name not in disabled and random.random() < 0.5
    }
    return inputs | dict(fixed or {})


def _number(random: Random, field: Mapping[str, Any]) -> float:
    """A number in the range of an input, sometimes the default or a limit."""
    low, high = field["minimum"], field["maximum"]
    if random.random() < 0.5:
        value: float = random.choice([low, high, field["default"]])
        return value
    if field["type"] == "integer":
        return random.randint(low, high)
    return round(random.uniform(low, high), 2)
