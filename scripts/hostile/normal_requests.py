"""Normal requests to Cog's server with the demo checkpoint, whose right answers are known."""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.benchmarks.schemas import SCHEMAS
from scripts.hostile import requests
from scripts.hostile.requests import Reply
from scripts.local_server import data_url

FOLDER = Path(__file__).resolve().parents[2] / "weights" / "demo" / "examples"
SCENES = [data_url(file) for file in sorted(FOLDER.glob("*.png"))]

INPUTS: list[dict[str, Any]] = [
    {"question": "Talk.", "max_new_tokens": 3},
    {"image": SCENES[0], "max_new_tokens": 12},
    {"image": SCENES[1], "question": "What is it?", "choices": ["circle", "star", "nothing"]},
    {"image": SCENES[2], "question": "What is there?", "num_beams": 2, "max_new_tokens": 5},
    {"image": SCENES[3], "temperature": 1, "top_p": 0.9, "seed": 5, "max_new_tokens": 8},
    {"question": "Count.", "temperature": 2, "top_k": 50, "seed": 1, "max_new_tokens": 8},
    {"images": SCENES[:3], "question": "What is there?", "max_new_tokens": 5},
    {"image": SCENES[0], "question": "How many shapes?", "stop_sequences": [" ", "e"]},
    {"image": SCENES[1], "question": "What is there?", "json_schema": SCHEMAS[1]},
    {"question": "Talk.", "repetition_penalty": 1.5, "system_prompt": "Hi.", "max_new_tokens": 5},
]
"""Besides the demo's examples."""


@dataclass(frozen=True)
class NormalRequest:
    """A JSON body and the right answer to it."""

    body: bytes
    answer: str

    def problem(self, reply: Reply) -> str:
        """What is wrong with a reply, or an empty text."""
        text = _answer(reply)
        if text is None:
            return f"HTTP {reply.status}: {reply.body[-300:].decode(errors='replace')}"
        return "" if text == self.answer else f"the answer is {text!r}, not {self.answer!r}"

    def wait_right(self, url: str, seconds: float) -> str:
        """Ask until the answer is right, for at most so long; returns what is wrong at the end."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                wrong = self.problem(requests.post(url, self.body, deadline - time.monotonic()))
            except OSError as error:
                wrong = f"a normal request fails: {error}"
            if not wrong or time.monotonic() > deadline:
                return wrong
            time.sleep(0.05)


def learn(url: str) -> list[NormalRequest]:
    """Requests of all kinds, with the answers of a server that has nothing else to do.

    Raises RuntimeError if it does not answer, or not always the same.
    """
    bodies = [_body(inputs) for inputs in [*INPUTS, {"image": _large(), "max_new_tokens": 2}]]
    learned = []
    for body in bodies:
        first, second = (_answer(requests.post(url, body)) for _ in range(2))
        if first is None or first != second:
            raise RuntimeError(f"{body[-200:]!r} is answered {first!r}, then {second!r}")
        learned.append(NormalRequest(body, first))
    return learned


def _answer(reply: Reply) -> str | None:
    prediction = reply.prediction()
    return "".join(prediction["output"]) if prediction.get("status") == "succeeded" else None


def _body(inputs: dict[str, Any]) -> bytes:
    return json.dumps({"input": inputs}).encode()


def _large() -> str:
    """An image that is so large that Cog passes it to its worker in a file."""
    file = io.BytesIO()
    Image.open(FOLDER / "scene-8.png").convert("RGB").resize((1400, 1400)).save(file, "BMP")
    return requests.data_url(file.getvalue(), "image/bmp")


def _examples() -> list[NormalRequest]:
    examples = []
    for example in json.loads((FOLDER / "questions.json").read_text()):
        images = [data_url(FOLDER / name) for name in example["images"]]
        body = _body({"images": images, "question": example["question"]})
        examples.append(NormalRequest(body, example["answer"]))
    return examples


EXAMPLES = _examples()
"""The demo's example questions."""
