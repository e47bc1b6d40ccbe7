"""Predictions of Cog's server with the demo checkpoint: inputs, answers and metrics."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.server.client import (
    EXAMPLES,
    METRICS,
    ONE_IMAGE,
    SECONDS,
    TWO_IMAGES,
    answer,
    ask,
    data_url,
    example_image,
    scene_image,
    streamed,
)
from tests.support.server import LocalServer, events


@pytest.mark.parametrize("asked", ONE_IMAGE, ids=lambda asked: asked["question"])
def test_jpeg_data_url_is_answered(server: LocalServer, asked: dict[str, Any]) -> None:
    prediction = ask(
        server, image=data_url(scene_image(asked["images"][0])), question=asked["question"]
    )
    assert answer(prediction) == asked["answer"]
    assert prediction["metrics"].keys() >= METRICS
    assert prediction["metrics"]["stop_reason"] == "end"


@pytest.mark.parametrize("asked", TWO_IMAGES, ids=lambda asked: asked["question"])
def test_image_and_images_are_combined(server: LocalServer, asked: dict[str, Any]) -> None:
    first, second = (data_url(scene_image(name)) for name in asked["images"])
    both = ask(server, image=first, images=[second], question=asked["question"])
    listed = ask(server, images=[first, second], question=asked["question"])
    assert answer(both) == answer(listed) == asked["answer"]


def test_image_is_fetched_from_an_http_url(
    server: LocalServer, file_server: str, tmp_path: Path
) -> None:
    asked = ONE_IMAGE[0]
    scene_image(asked["images"][0]).save(tmp_path / "scene.jpg", quality=95)
    prediction = ask(server, image=f"{file_server}/scene.jpg", question=asked["question"])
    assert answer(prediction) == asked["answer"]


def test_no_question_gives_a_caption(server: LocalServer) -> None:
    image = example_image()
    caption = answer(ask(server, image=image))
    assert caption == answer(ask(server, image=image, question="Describe the image."))
    assert len(caption.split()) > 3


def test_image_marker_places_the_image(server: LocalServer) -> None:
    asked = ONE_IMAGE[0]
    placed = ask(server, image=example_image(), question=f"<image>\n{asked['question']}")
    assert answer(placed) == asked["answer"]


def test_same_seed_gives_the_same_answer(server: LocalServer) -> None:
    inputs = {"image": example_image(), "temperature": 2, "seed": 7, "max_new_tokens": 20}
    assert answer(ask(server, **inputs)) == answer(ask(server, **inputs))


def test_max_new_tokens_and_stop_sequences_end_the_answer(server: LocalServer) -> None:
    image = example_image()
    whole = answer(ask(server, image=image))
    cut = ask(server, image=image, max_new_tokens=2)
    assert whole.startswith(answer(cut))
    assert cut["metrics"]["output_tokens"] == 2
    assert cut["metrics"]["stop_reason"] == "length"
    word = whole.split()[2]
    stopped = ask(server, image=image, stop_sequences=[word])
    assert answer(stopped) == whole[: whole.index(word)]
    assert stopped["metrics"]["stop_reason"] == "stop"


def test_beam_search_answers(server: LocalServer) -> None:
    asked = ONE_IMAGE[0]
    prediction = ask(server, image=example_image(), question=asked["question"], num_beams=3)
    assert answer(prediction) == asked["answer"]


def test_stream_has_the_text_of_the_json_answer(server: LocalServer) -> None:
    image = example_image()
    with streamed(server, "whole-stream", image=image) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        received = list(events(response))
    chunks = [event.data["chunk"] for event in received if event.name == "output"]
    assert len(chunks) > 1
    assert "".join(chunks) == answer(ask(server, image=image))
    assert received[0].name == "start"
    assert received[-1].name == "completed"
    assert received[-1].data["status"] == "succeeded"
    assert {event.data["name"] for event in received if event.name == "metric"} >= METRICS


def test_concurrent_clients_get_their_own_answers(server: LocalServer) -> None:
    def ask_example(asked: dict[str, Any]) -> str:
        images = [data_url(scene_image(name)) for name in asked["images"]]
        return answer(ask(server, images=images, question=asked["question"]))

    requests = (EXAMPLES * 16)[:32]
    with ThreadPoolExecutor(16) as clients:
        assert list(clients.map(ask_example, requests)) == [asked["answer"] for asked in requests]


def test_answer_is_one_of_the_choices(server: LocalServer) -> None:
    asked = ONE_IMAGE[0]
    choices = ["a sunny day", asked["answer"], "seven"]
    prediction = ask(server, image=example_image(), question=asked["question"], choices=choices)
    assert answer(prediction) == asked["answer"]
    probabilities = prediction["metrics"]["choices"]
    assert probabilities.keys() == set(choices)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert max(probabilities, key=probabilities.__getitem__) == asked["answer"]


def test_answer_follows_the_json_schema(server: LocalServer) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "circles": {"type": "integer"}},
        "required": ["color", "circles"],
        "additionalProperties": False,
    }
    prediction = ask(server, image=example_image(), question="What do you see?", json_schema=schema)
    jsonschema.validate(json.loads(answer(prediction)), schema)
    assert "choices" not in prediction["metrics"]


def test_put_rejects_an_id_that_differs_from_its_url(server: LocalServer) -> None:
    response = httpx.put(f"{server.url}/predictions/one", json={"id": "two", "input": {}})
    assert response.status_code == 422


def test_health_check_reports_that_the_server_is_ready(server: LocalServer) -> None:
    health = server.health()
    assert health["status"] == "READY"
    assert health["setup"]["status"] == "succeeded"


def test_log_says_that_the_demo_is_a_demonstration(server: LocalServer) -> None:
    deadline = time.monotonic() + SECONDS
    while "demonstration" not in server.log():  # the worker may log after the server is ready
        assert time.monotonic() < deadline, server.log()
