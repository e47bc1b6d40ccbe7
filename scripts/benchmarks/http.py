"""The part `http`: many clients of Cog's server against one, and the engine's own cost."""

import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import httpx
from PIL import Image

import xgenmm
from scripts.benchmarks.report import Options, Row
from scripts.demo_model.evaluation_set import evaluation_groups
from scripts.demo_model.wordings import WORDINGS
from scripts.local_server import LocalServer, predict, serving
from xgenmm.engine.reference import answer_text

CLIENTS = 16
ROUNDS = 3
LOAD_SECONDS = 300.0
SHORT_KINDS = ("count", "existence", "place")


def http(options: Options) -> list[Row]:
    """Measure the demo checkpoint on a CPU.

    A client's conversation on an image is a caption in every wording, then three short questions.
    """
    conversations = _conversations(options.requests or ROUNDS * (4 + 2 * CLIENTS))
    one, many = _tokens_per_second(conversations)
    mixed = [requests[number % len(requests)] for number, requests in enumerate(conversations)]
    with_engine, without = _latencies(mixed)
    ratio = statistics.median(a / b for a, b in zip(with_engine, without, strict=True))
    workload = f"on each image {len(WORDINGS['caption'])} captions, then {len(SHORT_KINDS)}"
    return [
        Row("http", f"1 client ({workload} short questions)", one, "tokens/s"),
        Row("http", f"{CLIENTS} clients (the same)", many, "tokens/s"),
        Row("http", f"{CLIENTS} clients against 1", many / one, "x"),
        Row("http", "1 request without the engine", 1e3 * statistics.median(without), "ms"),
        Row("http", "1 request through the engine", 1e3 * statistics.median(with_engine), "ms"),
        Row("http", "through the engine against without", ratio, "x", at_most=1.05),
    ]


def _conversations(count: int) -> list[list[xgenmm.Request]]:
    """The requests of each conversation; no two have the same image."""
    conversations: list[list[xgenmm.Request]] = []
    for group in evaluation_groups(2 * count + 8):  # not every scene allows all kinds of questions
        by_kind = {case.kind: case.question for case in group}
        if by_kind.keys() >= {"caption", *SHORT_KINDS}:
            questions = [*WORDINGS["caption"], *(by_kind[kind] for kind in SHORT_KINDS)]
            images = group[0].images
            conversations.append([xgenmm.Request(question, images) for question in questions])
    return conversations[:count]


def _tokens_per_second(conversations: Sequence[Sequence[xgenmm.Request]]) -> tuple[float, float]:
    """Tokens a second of one client and of many: medians of alternating rounds.

    Every round has its own images, so that none finds another's in the cache.
    """
    bodies = iter([list(map(_body, requests)) for requests in conversations])
    share = max(1, len(conversations) // ROUNDS)
    environment = {
        "XGENMM_MODEL": "demo",
        "XGENMM_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": str(CLIENTS),
    }
    one: list[float] = []
    many: list[float] = []
    with serving(environment) as server:
        server.wait_ready(LOAD_SECONDS)
        while batch := list(islice(bodies, share)):
            few = max(1, len(batch) // 9)  # takes one client about as long as the rest takes many
            one.append(_rate(server, 1, batch[:few]))
            many.append(_rate(server, CLIENTS, batch[few:] or batch))
    return statistics.median(one), statistics.median(many)


def _rate(server: LocalServer, clients: int, conversations: Sequence[Sequence[bytes]]) -> float:
    """Tokens a second of `clients` that take one conversation after the other."""
    with httpx.Client(base_url=server.url, timeout=None) as client:

        def converse(bodies: Sequence[bytes]) -> int:
            return sum(predict(client, body)["metrics"]["output_tokens"] for body in bodies)

        with ThreadPoolExecutor(clients) as pool:
            started = time.monotonic()
            tokens = sum(pool.map(converse, conversations))
            return tokens / (time.monotonic() - started)


def _body(request: xgenmm.Request) -> bytes:
    """The request as JSON for Cog's server."""
    (image,) = request.images
    assert isinstance(image, Image.Image)
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return json.dumps({"input": {"image": url, "question": request.question}}).encode()


def _latencies(requests: Sequence[xgenmm.Request]) -> tuple[list[float], list[float]]:
    """Seconds of each request through an engine without caches, and without an engine."""
    engine = xgenmm.load("demo", device="cpu", prefix_caching=False)
    methods: list[Callable[[xgenmm.Request], str]] = [
        lambda request: engine.stream(request).text(),
        partial(answer_text, engine),
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for method in methods:  # the first request of a process is slower
        method(requests[0])
    for number, request in enumerate(requests):
        order = (0, 1) if number % 2 else (1, 0)
        for index in order:
            started = time.monotonic()
            methods[index](request)
            seconds[index].append(time.monotonic() - started)
    engine.close()
    return seconds
