"""The part `host`: the engine's own work, measured with a model that costs nothing."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import xgenmm
from scripts.benchmarks.free_model import free_model
from scripts.benchmarks.report import Options, Row
from scripts.local_server import LocalServer, serving
from xgenmm import Answer, Engine, Request, SamplingParams

READERS: dict[str, Callable[[Answer], object]] = {
    "read at the end": lambda answer: answer.text(),
    "read piece by piece": lambda answer: deque(answer, 0),  # wakes a thread for each token
}
STEP_GOALS = {1: 0.2, 16: 0.6, 64: 2.0}  # streams -> ms per step
RATE_GOALS = {1: None, 16: 10_000}  # clients -> tokens/s
TOKENS = 2000
ANSWERS = 4  # of each client, one after the other
CACHE_BYTES = 2 << 30  # enough for all streams
LOAD_SECONDS = 300.0


def host(options: Options) -> Iterator[Row]:
    """Measure steps in this process, then Cog's server with streaming clients, on a CPU.

    The best round of each counts, since other work on the machine only ever makes a round slower.
    """
    rounds = range(options.rounds)
    with free_model():
        engine = xgenmm.load(
            "demo", device="cpu", max_num_seqs=max(STEP_GOALS), cache_bytes=CACHE_BYTES
        )
        for how, read in READERS.items():
            for streams, goal in STEP_GOALS.items():
                best = 1e3 * min(_step_seconds(engine, streams, read) for _ in rounds)
                what = f"step, {_count(streams, 'stream')} {how}"
                yield Row("host", what, best, "ms", at_most=goal)
        engine.close()
    environment = {
        "XGENMM_MODEL": "demo",
        "XGENMM_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": str(max(RATE_GOALS)),
        "COG_PREDICT_TYPE_STUB": "scripts/benchmarks/host_predictor.py:Predictor",
    }
    with serving(environment) as server:
        server.wait_ready(LOAD_SECONDS)
        _stream(server)  # the first request of a process is slower
        for clients, rate_goal in RATE_GOALS.items():
            rate, events = max(_rate(server, clients) for _ in rounds)
            what = f"{_count(clients, 'client')} ({events:.0f} events for {TOKENS} tokens)"
            yield Row("host", what, rate, "tokens/s", at_least=rate_goal)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _step_seconds(engine: Engine, streams: int, read: Callable[[Answer], object]) -> float:
    """Seconds of a decode step, from the requests to the end of the first stream."""
    request = Request("Talk.", sampling=SamplingParams(max_new_tokens=TOKENS))
    steps, started = engine.status().steps, time.monotonic()
    first, *others = [engine.stream(request) for _ in range(streams)]
    with ThreadPoolExecutor(streams) as pool:
        for answer in others:
            pool.submit(read, answer)
        read(first)
        seconds = time.monotonic() - started
        return seconds / (engine.status().steps - steps)


def _rate(server: LocalServer, clients: int) -> tuple[float, float]:
    """Tokens per second of all clients together, and events per answer."""
    count = ANSWERS * clients
    with ThreadPoolExecutor(clients) as pool:
        started = time.monotonic()
        events = sum(pool.map(lambda _: _stream(server), range(count)))
        return count * TOKENS / (time.monotonic() - started), events / count


def _stream(server: LocalServer) -> int:
    """Read one streamed answer of `TOKENS` tokens; returns the number of events with text.

    Parses nothing before the end, because the client shares the processor with the server.
    """
    body = json.dumps({"input": {"question": "Talk.", "max_new_tokens": TOKENS}})
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    while True:
        connection = HTTPConnection(urlsplit(server.url).netloc)
        connection.request("POST", "/predictions", body, headers)
        response = connection.getresponse()
        received = response.read()
        connection.close()
        if response.status != 409:  # Cog frees the slot of a prediction a moment after its end
            break
        time.sleep(0.001)
    last = json.loads(received.rpartition(b"data: ")[2])
    if response.status != 200 or last.get("metrics", {}).get("output_tokens") != TOKENS:
        raise RuntimeError(f"the server answered {response.status}: {last}")
    return received.count(b"event: output")
