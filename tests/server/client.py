"""Helpers of the tests of Cog's server: inputs, requests, and streams of events."""

import base64
import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from PIL import Image

from tests.support.paths import DEMO
from tests.support.server import Event, LocalServer, events

EXAMPLES_FOLDER = DEMO / "examples"
EXAMPLES: list[dict[str, Any]] = json.loads((EXAMPLES_FOLDER / "questions.json").read_text())
ONE_IMAGE = [example for example in EXAMPLES if len(example["images"]) == 1]
TWO_IMAGES = [example for example in EXAMPLES if len(example["images"]) == 2]
SECONDS = 120.0
ENDLESS: dict[str, Any] = {"question": "Talk.", "max_new_tokens": 2048}
"""With the checkpoint `endless`, the answer has the maximum length."""
MAX_CONCURRENCY = 4  # of `endless_server`
METRICS = {
    "prompt_tokens",
    "image_tokens",
    "cached_tokens",
    "output_tokens",
    "queue_time",
    "prefill_time",
    "time_to_first_token",
    "tokens_per_second",
    "batch_size",
    "stop_reason",
}


def scene_image(name: str) -> Image.Image:
    return Image.open(EXAMPLES_FOLDER / name).convert("RGB")


def data_url(content: Image.Image | bytes, file_format: str = "JPEG") -> str:
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, file_format, quality=95)
        content = file.getvalue()
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(content).decode()}"


def example_image() -> str:
    """The image of the first example as a data URL."""
    return data_url(scene_image(ONE_IMAGE[0]["images"][0]))


def when_free(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Send a request again while the server is full.

    A slot becomes free a moment after the last event of its prediction.
    """
    deadline = time.monotonic() + SECONDS
    while (response := send()).status_code == 409:
        assert time.monotonic() < deadline, "the server stays full"
    return response


def ask(server: LocalServer, **inputs: Any) -> dict[str, Any]:
    """The prediction that a JSON request returns."""
    url, body = f"{server.url}/predictions", {"input": inputs}
    response = when_free(lambda: httpx.post(url, json=body, timeout=SECONDS))
    assert response.status_code == 200, response.text
    prediction: dict[str, Any] = response.json()
    return prediction


def answer(prediction: dict[str, Any]) -> str:
    assert prediction["status"] == "succeeded", prediction
    return "".join(prediction["output"])


def assert_answers(server: LocalServer) -> None:
    """Assert that the server still works by asking an example question."""
    asked = ONE_IMAGE[0]
    assert answer(ask(server, image=example_image(), question=asked["question"])) == asked["answer"]


@contextlib.contextmanager
def streamed(server: LocalServer, prediction_id: str, **inputs: Any) -> Iterator[httpx.Response]:
    """A response with server-sent events, which arrive while the answer is generated."""
    with httpx.Client(timeout=SECONDS) as client:
        request = client.build_request(
            "PUT",
            f"{server.url}/predictions/{prediction_id}",
            headers={"Accept": "text/event-stream"},
            json={"input": inputs},
        )
        with contextlib.closing(when_free(lambda: client.send(request, stream=True))) as response:
            yield response


def until_output(response: httpx.Response) -> Iterator[Event]:
    """Read events up to the first output; returns the iterator over the rest.

    The response closes when that iterator is deleted.
    """
    stream = events(response)
    for event in stream:
        if event.name == "output":
            return stream
    raise AssertionError("the answer ended without an output")


def cancel(server: LocalServer, prediction_id: str, rest: Iterator[Event]) -> dict[str, Any]:
    """Cancel a prediction that streams; returns the data of its last event."""
    response = httpx.post(f"{server.url}/predictions/{prediction_id}/cancel")
    assert response.status_code == 200
    last = list(rest)[-1]
    assert last.name == "completed"
    return last.data
