"""vLLM's OpenAI server with the demo, through OpenAI's client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import xgenmm
from tests.support.paths import DEMO
from tests.support.server import data_url, free_port

pytestmark = pytest.mark.timeout(900)

EXAMPLES = DEMO / "examples"
START_SECONDS = 600.0


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    options = ["--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options, "--port", str(port)],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).is_success:
                return
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)


def messages(question: str, images: list[str]) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(EXAMPLES / i)}} for i in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def read_questions() -> list[dict[str, Any]]:
    questions: list[dict[str, Any]] = json.loads((EXAMPLES / "questions.json").read_text())
    return questions


def test_answers_equal_those_of_the_engine(client: openai.OpenAI) -> None:
    engine = xgenmm.load("demo", device="cpu", dtype="float32")
    for example in read_questions():
        images = [xgenmm.read_image(EXAMPLES / name) for name in example["images"]]
        expected = "".join(engine.stream(xgenmm.Request(example["question"], images)))
        answer = client.chat.completions.create(
            model="demo", messages=messages(example["question"], example["images"])
        )
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"


def test_streamed_answer_equals_the_whole(client: openai.OpenAI) -> None:
    question = messages("What is to the left of the orange star?", ["scene-8.png"])
    whole = client.chat.completions.create(model="demo", messages=question)
    chunks = client.chat.completions.create(model="demo", messages=question, stream=True)
    streamed = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(streamed) == whole.choices[0].message.content


def test_invalid_input_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="images: 1 given, but 2 <image>"):
        client.chat.completions.create(
            model="demo", messages=messages("<image> or <image>?", ["scene-8.png"])
        )
