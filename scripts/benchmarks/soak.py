"""The part `soak`: thousands of random requests; none may get lost, leak or end wrongly."""

import logging
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import psutil

import xgenmm
from scripts.benchmarks.random_data import noise_image
from scripts.benchmarks.report import Options, Row
from scripts.benchmarks.soak_clients import REFUSED, random_client
from xgenmm import Engine

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 24
MEMORY_SAMPLES = 40
CONTEXT = 1024
CACHE_BYTES = 11 << 20
"""One request of the whole context and little more, so that requests are preempted."""


@dataclass(frozen=True)
class SoakResult:
    """The outcome of a soak.

    outcomes: the number of requests by stop reason, or `REFUSED`.
    unexpected: descriptions of requests with a wrong outcome.
    leaked: blocks that are not free and requests that the engine still knows at the end.
    preemptions: how often requests were computed again because blocks ran out.
    growth: the largest resident memory after the first tenth, relative to that at the tenth.
    """

    outcomes: Counter[str]
    unexpected: list[str]
    leaked: int
    preemptions: int
    growth: float


def soak(options: Options) -> list[Row]:
    """Measure the demo checkpoint, in this process."""
    count = options.requests or 20_000
    engine = _crowded_engine()
    result = run_soak(engine, count, seed=0)
    for description in result.unexpected:
        logger.warning("%s", description)
    outcomes = ", ".join(f"{number} {name}" for name, number in result.outcomes.most_common())
    total, growth = result.outcomes.total(), 100 * (result.growth - 1)
    unexpected = len(result.unexpected)
    return [
        Row("soak", f"accounted for ({outcomes})", total, "requests", count, count),
        Row("soak", "with an unexpected outcome", unexpected, "requests", at_most=0),
        Row("soak", "leaked", result.leaked, "requests or blocks", at_most=0),
        Row("soak", "preemptions", result.preemptions, "", at_least=100 if count >= 20_000 else 0),
        Row("soak", "growth of memory after the first tenth", growth, "%", at_most=5),
    ]


def _crowded_engine() -> Engine:
    """The demo with a shorter context and too little memory for all that run at once."""
    loaded = xgenmm.load("demo", device="cpu", max_num_seqs=1)
    config = loaded.config
    loaded.model.config = replace(config, decoder=replace(config.decoder, max_positions=CONTEXT))
    return Engine(loaded.model, loaded.tokenizer, MAX_NUM_SEQS, CACHE_BYTES)


def run_soak(engine: Engine, requests: int, seed: int) -> SoakResult:
    """Run random clients, at most two for each row at a time, then close the engine."""
    rng = random.Random(seed)
    images = [noise_image(rng, (rng.randint(8, 200), rng.randint(8, 200))) for _ in range(24)]
    process, memory = psutil.Process(), list[int]()
    outcomes, unexpected = Counter[str](), list[str]()
    with ThreadPoolExecutor(2 * engine.max_num_seqs) as pool:
        step = -(-requests // MEMORY_SAMPLES)
        for start in range(0, requests, step):
            numbers = range(start, min(start + step, requests))
            clients = [random_client(random.Random(f"{seed} {i}"), images, engine) for i in numbers]
            answers = pool.map(lambda client: client.run(engine), clients)
            for client, answer in zip(clients, answers, strict=True):
                outcome = REFUSED if answer is None else answer.outcome()
                outcomes[outcome] += 1
                if outcome not in client.outcomes:
                    unexpected.append(f"{client.name}: {outcome}")
            memory.append(process.memory_info().rss)
    engine.close()
    settled = memory[len(memory) // 10 :]
    growth, preemptions = max(settled) / settled[0], engine.status().preemptions
    return SoakResult(outcomes, unexpected, _leaked(engine), preemptions, growth)


def _leaked(engine: Engine) -> int:
    status = engine.status()
    return status.running + status.waiting + status.num_blocks - status.free_blocks
