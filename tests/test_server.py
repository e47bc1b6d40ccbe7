"""Cog's own server with the demo checkpoint, over HTTP, as a client meets it."""

import base64
import contextlib
import io
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts.local_server import ROOT, Event, LocalServer, ServerError, events, serving

DEMO = ROOT / "weights" / "demo"
EXAMPLES_FOLDER = DEMO / "examples"
EXAMPLES: list[dict[str, Any]] = json.loads((EXAMPLES_FOLDER / "questions.json").read_text())
ONE = [example for example in EXAMPLES if len(example["images"]) == 1]
TWO = [example for example in EXAMPLES if len(example["images"]) == 2]
SECONDS = 120.0
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
ENDLESS = {"question": "Talk.", "max_new_tokens": 2048}
AT_ONCE = 4
"""How many predictions the server with the endless checkpoint takes at a time."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that talks until it is cut off: the demo unable to end."""
    folder = tmp_path_factory.mktemp("endless")
    for file in DEMO.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    parameters = load_file(folder / "model.safetensors")
    for token in json.loads((folder / "added_tokens.json").read_text()).values():
        if token < len(parameters["vlm.lang_model.lm_head.bias"]):
            parameters["vlm.lang_model.lm_head.bias"][token] = -1e4
    save_file(parameters, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def endless_server(endless: Path) -> Iterator[LocalServer]:
    """Cog's server with the endless checkpoint, soon full."""
    environment = {"XGENMM_MODEL": str(endless), "COG_MAX_CONCURRENCY": str(AT_ONCE)}
    with serving(environment) as started:
        started.wait_ready(SECONDS)
        yield started


def scene_image(name: str) -> Image.Image:
    return Image.open(EXAMPLES_FOLDER / name).convert("RGB")


def data_url(shown: Image.Image | bytes, file_format: str = "JPEG") -> str:
    if isinstance(shown, Image.Image):
        file = io.BytesIO()
        shown.save(file, file_format, quality=95)
        shown = file.getvalue()
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(shown).decode()}"


def when_free(send: Callable[[], httpx.Response]) -> httpx.Response:
    """The response, asked for again while the server is full.

    It gives a slot back a moment after the last event of the prediction in it.
    """
    deadline = time.monotonic() + SECONDS
    while (response := send()).status_code == 409:
        assert time.monotonic() < deadline, "the server stays full"
    return response


def ask(server: LocalServer, **inputs: Any) -> dict[str, Any]:
    """The prediction that a plain JSON request gets."""
    url, body = f"{server.url}/predictions", {"input": inputs}
    response = when_free(lambda: httpx.post(url, json=body, timeout=SECONDS))
    assert response.status_code == 200, response.text
    prediction: dict[str, Any] = response.json()
    return prediction


def answer(prediction: dict[str, Any]) -> str:
    assert prediction["status"] == "succeeded", prediction
    return "".join(prediction["output"])


@contextlib.contextmanager
def streamed(server: LocalServer, prediction_id: str, **inputs: Any) -> Iterator[httpx.Response]:
    """A response whose `events` arrive while the answer is made."""
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
    """The rest of a response's events after the first output; let go of, it closes the response."""
    stream = events(response)
    for event in stream:
        if event.name == "output":
            return stream
    raise AssertionError("the answer ended without an output")


@contextlib.contextmanager
def talking(server: LocalServer, *prediction_ids: str) -> Iterator[dict[str, Iterator[Event]]]:
    """Endless answers at once, each after its first output; all must still be at work at the end.

    A test that ends one itself takes it out.
    """
    with contextlib.ExitStack() as responses:
        running = {
            name: until_output(responses.enter_context(streamed(server, name, **ENDLESS)))
            for name in prediction_ids
        }
        yield running
        for name, rest in running.items():
            assert cancel(server, name, rest)["status"] == "canceled"


def cancel(server: LocalServer, prediction_id: str, rest: Iterator[Event]) -> dict[str, Any]:
    """Cancel a prediction that streams; what the last event says of it."""
    response = httpx.post(f"{server.url}/predictions/{prediction_id}/cancel")
    assert response.status_code == 200
    last = list(rest)[-1]
    assert last.name == "completed"
    return last.data


def wait_refused(server: LocalServer) -> None:
    """Return when the server takes no new requests."""
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(httpx.ConnectError):
        while time.monotonic() < deadline:
            httpx.get(server.url)
        raise AssertionError("the server still takes requests")


def assert_answers(server: LocalServer) -> None:
    """The server is in order: it gives a right answer."""
    asked = ONE[0]
    image = data_url(scene_image(asked["images"][0]))
    assert answer(ask(server, image=image, question=asked["question"])) == asked["answer"]


@pytest.mark.parametrize("asked", ONE, ids=lambda asked: asked["question"])
def test_jpeg_as_data_url(server: LocalServer, asked: dict[str, Any]) -> None:
    prediction = ask(
        server, image=data_url(scene_image(asked["images"][0])), question=asked["question"]
    )
    assert answer(prediction) == asked["answer"]
    assert prediction["metrics"].keys() >= METRICS
    assert prediction["metrics"]["stop_reason"] == "end"


@pytest.mark.parametrize("asked", TWO, ids=lambda asked: asked["question"])
def test_two_images(server: LocalServer, asked: dict[str, Any]) -> None:
    first, second = (data_url(scene_image(name)) for name in asked["images"])
    both = ask(server, image=first, images=[second], question=asked["question"])
    listed = ask(server, images=[first, second], question=asked["question"])
    assert answer(both) == answer(listed) == asked["answer"]


def test_image_from_an_http_address(server: LocalServer, file_server: str, tmp_path: Path) -> None:
    asked = ONE[0]
    scene_image(asked["images"][0]).save(tmp_path / "scene.jpg", quality=95)
    prediction = ask(server, image=f"{file_server}/scene.jpg", question=asked["question"])
    assert answer(prediction) == asked["answer"]


def test_no_question_is_a_caption(server: LocalServer) -> None:
    image = data_url(scene_image(ONE[0]["images"][0]))
    caption = answer(ask(server, image=image))
    assert caption == answer(ask(server, image=image, question="Describe the image."))
    assert len(caption.split()) > 3


def test_image_mark_places_the_image(server: LocalServer) -> None:
    asked = ONE[0]
    image = data_url(scene_image(asked["images"][0]))
    placed = ask(server, image=image, question=f"<image>\n{asked['question']}")
    assert answer(placed) == asked["answer"]


def test_same_seed_same_answer(server: LocalServer) -> None:
    inputs = {
        "image": data_url(scene_image(ONE[0]["images"][0])),
        "temperature": 2,
        "seed": 7,
        "max_new_tokens": 20,
    }
    assert ask(server, **inputs)["output"] == ask(server, **inputs)["output"]


def test_limits_of_the_answer(server: LocalServer) -> None:
    image = data_url(scene_image(ONE[0]["images"][0]))
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
    image = data_url(scene_image(asked["images"][0]))
    prediction = ask(server, image=image, question=asked["question"], num_beams=3)
    assert answer(prediction) == asked["answer"]


def test_stream_carries_the_same_text(server: LocalServer) -> None:
    image = data_url(scene_image(ONE[0]["images"][0]))
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
    with streamed(endless_server, "running", **ENDLESS) as response:
        rest = until_output(response)
        last = cancel(endless_server, "running", rest)
    assert last["status"] == "canceled"
    assert last["metrics"]["stop_reason"] == "cancelled"
    assert last["metrics"]["output_tokens"] < ENDLESS["max_new_tokens"]
    assert last["metrics"].keys() >= METRICS


def test_many_askers_get_their_own_answers(server: LocalServer) -> None:
    def ask_example(asked: dict[str, Any]) -> str:
        images = [data_url(scene_image(name)) for name in asked["images"]]
        return answer(ask(server, images=images, question=asked["question"]))

    crowd = (EXAMPLES * 16)[:32]
    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(ask_example, crowd)) == [asked["answer"] for asked in crowd]


def test_full_server_refuses_one_more_and_streams_to_all(endless_server: LocalServer) -> None:
    names = [f"full-{number}" for number in range(AT_ONCE)]
    with talking(endless_server, *names) as running:
        assert endless_server.health()["status"] == "BUSY"
        refused = httpx.post(f"{endless_server.url}/predictions", json={"input": ENDLESS})
        assert refused.status_code == 409
        name, rest = running.popitem()
        assert cancel(endless_server, name, rest)["metrics"]["batch_size"] == AT_ONCE


def test_cancel_of_one_among_many_frees_its_slot(endless_server: LocalServer) -> None:
    names = [f"among-{number}" for number in range(AT_ONCE)]
    with talking(endless_server, *names) as running:
        last = cancel(endless_server, names[1], running.pop(names[1]))
        assert last["status"] == "canceled"
        assert ask(endless_server, question="Talk.", max_new_tokens=3)["status"] == "succeeded"


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_client_that_leaves_frees_its_slot(endless_server: LocalServer, accept: str) -> None:
    names = [f"staying-{number}" for number in range(AT_ONCE - 1)]
    with talking(endless_server, *names):
        url = httpx.URL(endless_server.url)
        leaving = HTTPConnection(url.host, url.port)
        leaving.request(
            "POST",
            "/predictions",
            json.dumps({"input": ENDLESS}),
            {"Content-Type": "application/json", "Accept": accept},
        )
        deadline = time.monotonic() + SECONDS
        while endless_server.health()["status"] != "BUSY":
            assert time.monotonic() < deadline, "the request has not arrived"
        leaving.close()
        assert ask(endless_server, question="Talk.", max_new_tokens=3)["status"] == "succeeded"


def test_cancel_of_an_unknown_prediction(server: LocalServer) -> None:
    assert httpx.post(f"{server.url}/predictions/nobody/cancel").status_code == 404


def test_put_again_joins_the_running_prediction(endless_server: LocalServer) -> None:
    with talking(endless_server, "joined"):
        url = f"{endless_server.url}/predictions/joined"
        again = httpx.put(url, json={"input": ENDLESS})
        assert again.status_code == 202
        assert (again.json()["id"], again.json()["status"]) == ("joined", "processing")


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(endless: Path) -> None:
    tokens = 1000
    with serving({"XGENMM_MODEL": str(endless)}) as leaving:
        leaving.wait_ready(SECONDS)
        with streamed(leaving, "last", question="Talk.", max_new_tokens=tokens) as response:
            rest = until_output(response)
            leaving.process.terminate()
            wait_refused(leaving)
            last = list(rest)[-1].data
        assert last["status"] == "succeeded"
        assert last["metrics"]["output_tokens"] == tokens
        assert leaving.process.wait(SECONDS) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(leaving.process.pid, 0)


def test_choices(server: LocalServer) -> None:
    asked = ONE[0]
    choices = ["a sunny day", asked["answer"], "seven"]
    prediction = ask(
        server,
        image=data_url(scene_image(asked["images"][0])),
        question=asked["question"],
        choices=choices,
    )
    assert answer(prediction) == asked["answer"]
    probabilities = prediction["metrics"]["choices"]
    assert probabilities.keys() == set(choices)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert max(probabilities, key=probabilities.__getitem__) == asked["answer"]


def test_json_schema(server: LocalServer) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "circles": {"type": "integer"}},
        "required": ["color", "circles"],
        "additionalProperties": False,
    }
    image = data_url(scene_image(ONE[0]["images"][0]))
    prediction = ask(server, image=image, question="What do you see?", json_schema=schema)
    jsonschema.validate(json.loads(answer(prediction)), schema)
    assert "choices" not in prediction["metrics"]


def test_put_wants_the_id_of_its_address(server: LocalServer) -> None:
    response = httpx.put(f"{server.url}/predictions/one", json={"id": "two", "input": {}})
    assert response.status_code == 422


def test_health_check(server: LocalServer) -> None:
    health = server.health()
    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"


def test_demo_says_in_the_log_what_it_is(server: LocalServer) -> None:
    deadline = time.monotonic() + SECONDS
    while "demonstration" not in server.log():  # the worker's last lines come after READY
        assert time.monotonic() < deadline, server.log()


def oversized_png() -> bytes:
    """The header of an image of 10,000 x 10,000 pixels, and nothing more."""
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def scene() -> str:
    return data_url(scene_image(ONE[0]["images"][0]))


BAD_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing": (lambda: {}, "question: "),
    "no image where one is placed": (lambda: {"question": "<image> What is it?"}, "1"),
    "one mark for two images": (
        lambda: {"images": [scene(), scene()], "question": "<image> What is it?"},
        "2",
    ),
    "empty file": (lambda: {"image": data_url(b"")}, "image: the file is empty"),
    "no image": (lambda: {"image": data_url(b"hello")}, "image: "),
    "second image damaged": (lambda: {"images": [scene(), data_url(b"x")]}, "images[1]: "),
    "over 64 megapixels": (lambda: {"image": data_url(oversized_png(), "PNG")}, "image: "),
    "file of the server": (lambda: {"image": str(ROOT / "LICENSE")}, "image: must be an http"),
    "address among images": (lambda: {"images": [scene(), "b.png"]}, "images[1]: must be"),
    "prompt too long": (lambda: {"question": "star " * 10_000}, "question: "),
    "role": (
        lambda: {"question": "?", "messages": [{"role": "god", "content": "?"}]},
        "messages: ",
    ),
    "beams that are drawn": (
        lambda: {"image": scene(), "num_beams": 2, "temperature": 1},
        "num_beams: ",
    ),
    "nothing to choose from": (lambda: {"image": scene(), "choices": []}, "choices: "),
    "one choice twice": (lambda: {"image": scene(), "choices": ["a", "a"]}, "choices: "),
    "two forms of answer": (
        lambda: {"image": scene(), "choices": ["a", "b"], "json_schema": {}},
        "json_schema: ",
    ),
    "no schema": (lambda: {"image": scene(), "json_schema": {"type": "colour"}}, "json_schema: "),
    "schema that cannot be enforced": (
        lambda: {"image": scene(), "json_schema": {"not": {"type": "string"}}},
        "json_schema: ",
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
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2049),
        ("top_p", 1.5),
        ("temperature", "hot"),
        ("choices", "red"),
        ("json_schema", ["color"]),
    ],
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
    for name in ("predict.py", "openapi.json", "scripts/serve"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    environment = {"XGENMM_MODEL": "", "XGENMM_WEIGHTS": str(tmp_path / "weights")}
    with (
        serving(environment, root=tmp_path) as started,
        pytest.raises(ServerError, match=r"download xgen-mm-phi3-mini"),
    ):
        started.wait_ready(SECONDS)
