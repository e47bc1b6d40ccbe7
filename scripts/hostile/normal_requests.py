"""Normal requests to Cog's server with the demo checkpoint, whose right answers are known."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.hostile.requests import Reply, post
from scripts.local_server import data_url

FOLDER = Path(__file__).resolve().parents[2] / "weights" / "demo" / "examples"


@dataclass(frozen=True)
class NormalRequest:
    """A JSON body and the right answer to it."""

    body: bytes
    answer: str

    def problem(self, reply: Reply) -> str:
        """What is wrong with a reply, or an empty text."""
        prediction = reply.prediction()
        if prediction.get("status") != "succeeded":
            return f"HTTP {reply.status}: {reply.body[:200].decode(errors='replace')}"
        text = "".join(prediction["output"])
        return "" if text == self.answer else f"the answer is {text!r}, not {self.answer!r}"

    def wait_right(self, url: str, seconds: float) -> str:
        """Ask until the answer is right, for at most so long; returns what is wrong at the end."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                wrong = self.problem(post(url, self.body, deadline - time.monotonic()))
            except OSError as error:
                wrong = f"a normal request fails: {error}"
            if not wrong or time.monotonic() > deadline:
                return wrong
            time.sleep(0.05)


def _examples() -> list[NormalRequest]:
    """The demo's example questions."""
    requests = []
    for example in json.loads((FOLDER / "questions.json").read_text()):
        images = [data_url(FOLDER / name) for name in example["images"]]
        inputs: dict[str, Any] = {"images": images, "question": example["question"]}
        body = json.dumps({"input": inputs}).encode()
        requests.append(NormalRequest(body, example["answer"]))
    return requests


EXAMPLES = _examples()
