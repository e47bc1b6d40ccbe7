"""Cog's server: how long it takes to start, and requests a second of many clients."""

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.util import find_spec

import httpx

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import Figure, Skipped
from scripts.local_server import LocalServer, predict, serving

LOAD_SECONDS = 100.0
UNLIMITED = httpx.Limits(max_connections=None)


def server(context: Context) -> Iterator[Figure]:
    """Measure a server with as many predictions at once as the engine's stage has requests."""
    if find_spec("cog") is None:
        raise Skipped("cog is not installed")
    environment = {
        "XGENMM_MODEL": str(context.checkpoint),
        "XGENMM_DEVICE": context.device.device.type,
        "COG_MAX_CONCURRENCY": str(context.size.requests),
    }
    context.drop_model()  # the server needs the memory
    with serving(environment) as local:
        yield Figure("process start to READY", local.wait_ready(LOAD_SECONDS), "s")
        setup = local.health()["setup"]
        started, completed = (
            datetime.fromisoformat(setup[name]) for name in ("started_at", "completed_at")
        )
        yield Figure("of that setup()", (completed - started).total_seconds(), "s")
        yield from _request_rates(context, local)


def _request_rates(context: Context, local: LocalServer) -> Iterator[Figure]:
    size = context.size
    images = [
        f"data:image/jpeg;base64,{base64.b64encode(context.image(number)).decode()}"
        for number in range(4)
    ]
    with httpx.Client(base_url=local.url, timeout=None, limits=UNLIMITED) as client:

        def ask(number: int) -> None:
            inputs = {
                "image": images[number % len(images)],
                "question": f"What is number {number}?",
                "max_new_tokens": size.tokens,
            }
            predict(client, json.dumps({"input": inputs}).encode())

        ask(0)
        for clients in (1, size.requests):
            count = 4 * clients if context.device.cuda else clients
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(ask, range(count)))
            rate = count / (time.perf_counter() - started)
            yield Figure(f"{clients} clients on 4 images", rate, "requests/s")
