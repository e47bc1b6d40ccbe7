"""Cog's server: how long it takes to start, and requests a second of many clients."""

import base64
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import httpx

from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.random_data import photo_jpeg, write_checkpoint
from scripts.benchmarks.report import Row
from scripts.local_server import LocalServer, predict, serving

CLIENTS = (1, 16, 64)
LOAD_SECONDS = 300.0
UNLIMITED = httpx.Limits(max_connections=None)


def server(device: Device, size: Size) -> list[Row]:
    """Measure a random model of full size but for its vocabulary, which is that of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), size.config, device.device, device.dtype)
        environment = {
            "XGENMM_MODEL": folder,
            "XGENMM_DEVICE": device.device.type,
            "COG_MAX_CONCURRENCY": str(max(CLIENTS)),
        }
        with serving(environment) as local:
            ready = local.wait_ready(LOAD_SECONDS)
            setup = local.health()["setup"]
            started, completed = (
                datetime.fromisoformat(setup[name]) for name in ("started_at", "completed_at")
            )
            setup_seconds = (completed - started).total_seconds()
            return [
                Row("server", "process start to READY", ready, "s", at_most=12.0),
                Row("server", "of that setup()", setup_seconds, "s", at_most=5.0),
                *_request_rates(local, device, size),
            ]


def _request_rates(local: LocalServer, device: Device, size: Size) -> list[Row]:
    images = [
        f"data:image/jpeg;base64,{base64.b64encode(photo_jpeg(size.image, seed)).decode()}"
        for seed in range(4)
    ]
    rows = []
    with httpx.Client(base_url=local.url, timeout=None, limits=UNLIMITED) as client:

        def ask(number: int) -> None:
            inputs = {
                "image": images[number % len(images)],
                "question": f"What is number {number}?",
                "max_new_tokens": size.tokens,
            }
            predict(client, json.dumps({"input": inputs}).encode())

        ask(0)
        for clients in CLIENTS:
            count = 4 * clients if device.cuda else clients
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(ask, range(count)))
            rate = count / (time.perf_counter() - started)
            what = f"{clients} clients, {size.tokens} tokens an answer at most"
            rows.append(Row("server", what, rate, "requests/s"))
    return rows
