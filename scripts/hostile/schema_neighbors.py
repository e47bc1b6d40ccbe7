"""The time between two tokens of a stream beside requests with slow JSON Schemas.

    python -m scripts.hostile.schema_neighbors [NAME...]

A model with random weights and the vocabulary of the released models (32,064 tokens) generates free
text for one client, beside `--others` requests that are repeated until it ends: first free text,
then JSON for each of the schemas that take longest of those that are let in.
"""

import argparse
import dataclasses
import lzma
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.random_data import TINY_CONFIG, random_model
from scripts.hostile.schema_cases import closed, names, text
from xgenmm import Engine, EngineError, InputError, Request, SamplingParams
from xgenmm.engine.request import StopReason
from xgenmm.preprocessing.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "tests/golden/tokenizer/checkpoint"
SCHEMAS: dict[str, dict[str, Any]] = {
    "ordinary": closed(a=text(minLength=3_000)),
    "500 optional properties": {
        "type": "object",
        "properties": names(500),
        "additionalProperties": False,
    },
    "two long optional repeats": closed(a=text(pattern="a.{0,500}b.{0,500}c")),
    "two long repeats": closed(a=text(pattern=".{500}a.{500}")),
    "letters of any script": closed(a=text(pattern=r"^\p{L}{1,500}$")),
    "any class": closed(a=text(pattern=r"^(\p{L}|\p{N}|\p{P}){900}$")),
    "30 machines": closed(
        a={"anyOf": [text(pattern=f"a.{{0,90}}b{i}.{{0,90}}c") for i in range(30)]}
    ),
}


def build_engine(rows: int) -> Engine:
    """An engine of random weights whose steps take a few milliseconds on a CPU."""
    with tempfile.TemporaryDirectory() as name:
        for path in TOKENIZER.iterdir():
            data = path.read_bytes()
            content = lzma.decompress(data) if path.suffix == ".xz" else data
            (Path(name) / path.name.removesuffix(".xz")).write_bytes(content)
        tokenizer = Tokenizer.from_folder(
            Path(name),
            "slow",
            {"<image>": 32012, "<image placeholder>": 32013, "<|endofchunk|>": 32014},
        )
    decoder = dataclasses.replace(
        TINY_CONFIG.decoder, vocab_size=32064, initial_vocab=32012, hidden_size=256,
        intermediate_size=1024, num_layers=4, num_heads=4, max_positions=4096,
    )  # fmt: skip
    config = dataclasses.replace(TINY_CONFIG, decoder=decoder)
    model = random_model(config, torch.device("cpu"), torch.float32)
    return Engine(model, tokenizer, rows, cache_bytes=1 << 30)


def gaps(engine: Engine, tokens: int) -> list[float]:
    """Milliseconds between the tokens of one stream of free text."""
    sampling = SamplingParams(max_new_tokens=tokens, temperature=1.0, seed=1)
    answer = engine.stream(Request("Say anything.", sampling=sampling))
    times: list[float] = []
    passed_on = answer.token

    def token(token_id: int) -> StopReason | None:
        times.append(time.monotonic())
        return passed_on(token_id)

    answer.token = token  # type: ignore[method-assign]
    answer.text()
    return [1000 * (after - before) for before, after in pairwise(times)]


@contextmanager
def others(engine: Engine, count: int, schema: dict[str, Any] | None) -> Iterator[dict[str, int]]:
    """Run `count` other requests, one after another in each of as many threads."""
    stopped, tally = threading.Event(), {"requests": 0, "tokens": 0, "failed": 0}

    def work(seed: int) -> None:
        while not stopped.is_set():
            sampling = SamplingParams(max_new_tokens=400, temperature=1.0, seed=seed)
            try:
                answer = engine.stream(Request("Go on.", sampling=sampling, json_schema=schema))
                for _ in answer:
                    if stopped.is_set():
                        answer.cancel()
                tally["tokens"] += answer.usage.output_tokens
            except (EngineError, InputError):
                tally["failed"] += 1
            tally["requests"] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    try:
        yield tally
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of schemas; default: all")
    parser.add_argument("--others", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    engine = build_engine(options.others + 1)
    gaps(engine, 20)
    heads = (f"beside {options.others}", "median ms", "90 %", "99 %", "ratio", "requests", "failed")
    print("{:<28}{:>10}{:>8}{:>8}{:>7}{:>10}{:>8}".format(*heads))
    free: list[float] = []
    for name, schema in [("nothing", None), ("free text", None), *SCHEMAS.items()]:
        if options.names and schema and name not in options.names:
            continue
        count = 0 if name == "nothing" else options.others
        with others(engine, count, schema) as tally:
            times = sorted(gaps(engine, options.tokens))
        median = statistics.median(times)
        free = times if name == "free text" else free
        ratio = f"{median / statistics.median(free):.2f}" if free else ""
        high, highest = (times[int(len(times) * share)] for share in (0.9, 0.99))
        print(f"{name:<28}{median:>10.2f}{high:>8.2f}{highest:>8.2f}{ratio:>7}"
              f"{tally['requests']:>10}{tally['failed']:>8}")  # fmt: skip
        sys.stdout.flush()
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
