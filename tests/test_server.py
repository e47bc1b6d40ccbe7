"""Cog's own server with the demo checkpoint, over HTTP, as a client meets it."""

import base64
import io
import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from scripts.local_server import ROOT, Event, LocalServer, ServerError, events, serving

EXAMPLES_FOLDER = ROOT / "weights" / "demo" / "examples"
EXAMPLES: list[dict[str, Any]] = json.loads((EXAMPLES_FOLDER / "questions.json").read_text())
ONE = [example for example in EXAMPLES if len(example["pictures"]) == 1]
TWO = [example for example in EXAMPLES if len(example["pictures"]) == 2]
SECONDS = 120.0
METRICS = {
    "prompt_tokens",
    "image_tokens",
    "output_tokens",
    "time_to_first_token",
    "tokens_per_second",
    "stop_reason",
}


def picture(name: str) -> Image.Image:
    return Image.open(EXAMPLES_FOLDER / name).convert("RGB")


def data_url(shown: Image.Image | bytes, file_format: str = "JPEG") -> str:
    if isinstance(shown, Image.Image):
        file = io.BytesIO()
        shown.save(file, file_format, quality=95)
        shown = file.getvalue()
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(shown).decode()}"


def ask(server: LocalServer, **inputs: Any) -> dict[str, Any]:
    """The prediction that a plain JSON request gets."""
    response = httpx.post(f"{server.url}/predictions", json={"input": inputs}, timeout=SECONDS)
    assert response.status_code == 200, response.text
    prediction: dict[str, Any] = response.json()
    return prediction


def answer(prediction: dict[str, Any]) -> str:
    assert prediction["status"] == "succeeded", prediction
    return "".join(prediction["output"])


def streamed(server: LocalServer, prediction_id: str, **inputs: Any) -> Any:
    """A context manager of the response whose `events` arrive while the answer is made."""
    return httpx.stream(
        "PUT",
        f"{server.url}/predictions/{prediction_id}",
        headers={"Accept": "text/event-stream"},
        json={"input": inputs},
        timeout=SECONDS,
    )


def until_output(response: httpx.Response) -> Iterator[Event]:
    """The rest of a response's events after the first output; let go of, it closes the response."""
    stream = events(response)
    for event in stream:
        if event.name == "output":
            return stream
    raise AssertionError("the answer ended without an output")


def assert_answers(server: LocalServer) -> None:
    """The server is in order: it gives a right answer."""
    asked = ONE[0]
    image = data_url(picture(asked["pictures"][0]))
    assert answer(ask(server, image=image, question=asked["question"])) == asked["answer"]


def cancelled(server: LocalServer) -> int:
    """How many predictions the server has cancelled, by its log."""
    return server.log().count("Prediction cancelled")


@pytest.mark.parametrize("asked", ONE, ids=lambda asked: asked["question"])
def test_jpeg_as_data_url(server: LocalServer, asked: dict[str, Any]) -> None:
    prediction = ask(
        server, image=data_url(picture(asked["pictures"][0])), question=asked["question"]
    )
    assert answer(prediction) == asked["answer"]
    assert prediction["metrics"].keys() >= METRICS
    assert prediction["metrics"]["stop_reason"] == "end"


@pytest.mark.parametrize("asked", TWO, ids=lambda asked: asked["question"])
def test_two_pictures(server: LocalServer, asked: dict[str, Any]) -> None:
    first, second = (data_url(picture(name)) for name in asked["pictures"])
    both = ask(server, image=first, images=[second], question=asked["question"])
    listed = ask(server, images=[first, second], question=asked["question"])
    assert answer(both) == answer(listed) == asked["answer"]


def test_picture_from_an_http_address(
    server: LocalServer, file_server: str, tmp_path: Path
) -> None:
    asked = ONE[0]
    picture(asked["pictures"][0]).save(tmp_path / "scene.jpg", quality=95)
    prediction = ask(server, image=f"{file_server}/scene.jpg", question=asked["question"])
    assert answer(prediction) == asked["answer"]


def test_no_question_is_a_caption(server: LocalServer) -> None:
    image = data_url(picture(ONE[0]["pictures"][0]))
    caption = answer(ask(server, image=image))
    assert caption == answer(ask(server, image=image, question="Describe the image."))
    assert len(caption.split()) > 3


def test_image_mark_places_the_picture(server: LocalServer) -> None:
    asked = ONE[0]
    image = data_url(picture(asked["pictures"][0]))
    placed = ask(server, image=image, question=f"<image>\n{asked['question']}")
    assert answer(placed) == asked["answer"]


def test_same_seed_same_answer(server: LocalServer) -> None:
    inputs = {
        "image": data_url(picture(ONE[0]["pictures"][0])),
        "temperature": 2,
        "seed": 7,
        "max_new_tokens": 20,
    }
    assert ask(server, **inputs)["output"] == ask(server, **inputs)["output"]


def test_limits_of_the_answer(server: LocalServer) -> None:
    image = data_url(picture(ONE[0]["pictures"][0]))
    whole = answer(ask(server, image=image))
    cut = ask(server, image=image, max_new_tokens=2)
    assert whole.startswith(answer(cut))
    assert cut["metrics"]["output_tokens"] == 2
    assert cut["metrics"]["stop_reason"] == "length"
    word = whole.split()[2]
    stopped = ask(server, image=image, stop_sequences=[word])
    assert answer(stopped) == whole[: whole.index(word)]
    assert stopped["metrics"]["stop_reason"] == "stop"


def test_beams_give_an_answer(server: LocalServer) -> None:
    asked = ONE[0]
    image = data_url(picture(asked["pictures"][0]))
    prediction = ask(server, image=image, question=asked["question"], num_beams=3)
    assert answer(prediction) == asked["answer"]


def test_stream_carries_the_same_text(server: LocalServer) -> None:
    image = data_url(picture(ONE[0]["pictures"][0]))
    with streamed(server, "whole-stream", image=image) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        seen = list(events(response))
    chunks = [event.data["chunk"] for event in seen if event.name == "output"]
    assert len(chunks) > 1
    assert "".join(chunks) == answer(ask(server, image=image))
    assert seen[0].name == "start"
    assert seen[-1].name == "completed"
    assert seen[-1].data["status"] == "succeeded"
    assert {event.data["name"] for event in seen if event.name == "metric"} >= METRICS


def test_stream_comes_while_the_answer_is_made(endless_server: LocalServer) -> None:
    url = f"{endless_server.url}/predictions/running"
    with streamed(endless_server, "running", question="Talk.", max_new_tokens=2048) as response:
        rest = until_output(response)
        assert endless_server.health()["status"] == "BUSY"
        httpx.post(f"{url}/cancel")
        assert list(rest)[-1].data["status"] == "canceled"


def test_cancel_stops_the_work(endless_server: LocalServer) -> None:
    url = f"{endless_server.url}/predictions/cancelled"
    with streamed(endless_server, "cancelled", question="Talk.", max_new_tokens=2048) as response:
        rest = until_output(response)
        assert httpx.post(f"{url}/cancel").status_code == 200
        last = list(rest)[-1]
    assert last.name == "completed"
    assert last.data["status"] == "canceled"
    assert last.data["metrics"]["stop_reason"] == "cancelled"
    assert last.data["metrics"]["output_tokens"] < 2048
    assert ask(endless_server, question="Talk.", max_new_tokens=3)["status"] == "succeeded"


def test_cancel_of_an_unknown_prediction(server: LocalServer) -> None:
    assert httpx.post(f"{server.url}/predictions/nobody/cancel").status_code == 404


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_client_that_leaves_stops_the_work(endless_server: LocalServer, accept: str) -> None:
    body = {"input": {"question": "Talk.", "max_new_tokens": 2048}}
    before = cancelled(endless_server)
    with httpx.Client(timeout=SECONDS) as client:
        request = client.build_request(
            "POST", f"{endless_server.url}/predictions", headers={"Accept": accept}, json=body
        )
        if accept == "text/event-stream":
            until_output(client.send(request, stream=True))
        else:
            request.extensions["timeout"]["read"] = 0.5
            with pytest.raises(httpx.ReadTimeout):
                client.send(request)
    deadline = time.monotonic() + SECONDS
    while endless_server.health()["status"] != "READY":
        assert time.monotonic() < deadline, "the model is still at work"
    assert cancelled(endless_server) == before + 1


def test_put_again_joins_the_running_prediction(endless_server: LocalServer) -> None:
    url = f"{endless_server.url}/predictions/joined"
    body = {"input": {"question": "Talk.", "max_new_tokens": 2048}}
    with streamed(endless_server, "joined", **body["input"]) as response:
        rest = until_output(response)
        again = httpx.put(url, json=body)
        assert again.status_code == 202
        assert (again.json()["id"], again.json()["status"]) == ("joined", "processing")
        other = httpx.post(f"{endless_server.url}/predictions", json=body)
        assert other.status_code == 409, "one prediction at a time"
        httpx.post(f"{url}/cancel")
        assert list(rest)[-1].data["status"] == "canceled"


def test_put_wants_the_id_of_its_address(server: LocalServer) -> None:
    response = httpx.put(f"{server.url}/predictions/one", json={"id": "two", "input": {}})
    assert response.status_code == 422


def test_health_check(server: LocalServer) -> None:
    health = server.health()
    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"
    assert "demonstration" in health["setup"]["logs"]


def oversized_png() -> bytes:
    """The header of a picture of 10,000 x 10,000 pixels, and nothing more."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def scene() -> str:
    return data_url(picture(ONE[0]["pictures"][0]))


BAD_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing": (lambda: {}, "question: "),
    "no picture where one is placed": (lambda: {"question": "<image> What is it?"}, "1"),
    "one mark for two pictures": (
        lambda: {"images": [scene(), scene()], "question": "<image> What is it?"},
        "2",
    ),
    "empty file": (lambda: {"image": data_url(b"")}, "image: the file is empty"),
    "no picture": (lambda: {"image": data_url(b"hello")}, "image: "),
    "second picture damaged": (lambda: {"images": [scene(), data_url(b"x")]}, "images[1]: "),
    "over 64 megapixels": (lambda: {"image": data_url(oversized_png(), "PNG")}, "image: "),
    "file of the server": (lambda: {"image": str(ROOT / "LICENSE")}, "image: must be an http"),
    "address among pictures": (lambda: {"images": [scene(), "b.png"]}, "images[1]: must be"),
    "prompt too long": (lambda: {"question": "star " * 10_000}, "question: "),
    "role": (
        lambda: {"question": "?", "messages": [{"role": "god", "content": "?"}]},
        "messages: ",
    ),
    "beams that are drawn": (
        lambda: {"image": scene(), "num_beams": 2, "temperature": 1},
        "num_beams: ",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named_and_the_next_request_works(server: LocalServer, name: str) -> None:
    inputs, message = BAD_INPUTS[name]
    prediction = ask(server, **inputs())
    assert prediction["status"] == "failed"
    assert message in prediction["error"]
    assert_answers(server)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("max_new_tokens", 2049), ("top_p", 1.5), ("temperature", "hot")],
)
def test_value_out_of_range_is_refused_by_the_schema(
    server: LocalServer, name: str, value: object
) -> None:
    response = httpx.post(f"{server.url}/predictions", json={"input": {name: value}})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "input", name]
    assert_answers(server)


def test_address_that_gives_nothing(server: LocalServer, file_server: str) -> None:
    prediction = ask(server, image=f"{file_server}/nothing.jpg")
    assert prediction["status"] == "failed"
    assert f"{file_server}/nothing.jpg" in prediction["error"]
    assert_answers(server)


def test_missing_weights_say_what_to_type(tmp_path: Path) -> None:
    """A copy of the code without any checkpoint, as in an image built too early."""
    shutil.copytree(ROOT / "xgenmm", tmp_path / "xgenmm")
    for name in ("predict.py", "openapi.json", "scripts/serve", "weights/releases.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    environment = {"XGENMM_MODEL": "", "XGENMM_WEIGHTS": str(tmp_path / "weights")}
    with (
        serving(environment, root=tmp_path) as started,
        pytest.raises(ServerError, match=r"xgenmm\.weights download xgen-mm-phi3-mini"),
    ):
        started.wait_ready(60)
