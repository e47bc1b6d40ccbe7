"""The part `peers`: many image questions at once, against vLLM and a loop over `transformers`."""

import logging
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from scripts.benchmarks.image import MID_SIZE
from scripts.benchmarks.peers_engines import Question, Run, engines
from scripts.benchmarks.random_data import DEMO, photo_jpeg, write_checkpoint
from scripts.benchmarks.report import Options, Row
from scripts.demo_model.evaluation_set import evaluation_groups

REQUESTS = 64
WARM_UP = 2  # questions to each engine before anything is measured
PHOTO_SIZE = (768, 384)  # three tiles
STD = 0.04  # of the random weights; with 0.02, each answer repeats one word

logger = logging.getLogger(__name__)


def peers(options: Options) -> Iterator[Row]:
    """Measure the demo and a mid-size random checkpoint on a CPU.

    All engines compute in float32 and decode greedily, so their answers must be the same. They take
    turns. No two questions have the same image.
    """
    count = options.requests or REQUESTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = _demo_questions(folder, WARM_UP + count * options.rounds)
        rounds = [list(islice(questions, n)) for n in (WARM_UP, *[count] * options.rounds)]
        yield from _compare("demo", DEMO, rounds, options.vllm)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, MID_SIZE, torch.device("cpu"), torch.float32, STD)
        questions = _photo_questions(folder)
        rounds = [list(islice(questions, n)) for n in (WARM_UP, count)]
        yield from _compare("mid-size", checkpoint, rounds, options.vllm)


def _demo_questions(folder: Path, count: int) -> Iterator[Question]:
    for number, group in enumerate(evaluation_groups(count)[:count]):  # pairs are at the end
        case = group[number % len(group)]  # all kinds of questions
        file = folder / f"{number}.png"
        case.images[0].save(file)
        yield file, case.question


def _photo_questions(folder: Path) -> Iterator[Question]:
    texts = ("What is in this image?", "How many red shapes are there?", "")
    for number, text in enumerate(cycle(texts)):
        file = folder / f"{number}.jpg"
        file.write_bytes(photo_jpeg(PHOTO_SIZE, number))
        yield file, text


def _compare(
    checkpoint: str, folder: Path, rounds: Sequence[Sequence[Question]], vllm: Path
) -> Iterator[Row]:
    """The rows of each engine as soon as it has answered the last round, then the comparison.

    rounds: the first one is not measured.
    """
    warm_up, *earlier, last = rounds
    runs: dict[str, list[Run]] = {}
    with engines(folder, vllm, max_num_seqs=len(last)) as asks:
        for ask in asks.values():
            ask(warm_up)
        for questions in earlier:
            for name, ask in asks.items():
                runs.setdefault(name, []).append(ask(questions))
        for name, ask in asks.items():
            runs.setdefault(name, []).append(ask(last))
            yield from _rows(f"{checkpoint}, {name}", runs[name])
    ours, *others = runs
    for other in others:
        ratio = statistics.median(
            b.seconds / a.seconds for a, b in zip(runs[ours], runs[other], strict=True)
        )
        goal = 1.0 if other == "vLLM" else None
        yield Row("peers", f"{checkpoint}, times as fast as {other}", ratio, "x", at_least=goal)
        yield _equality(f"{checkpoint}, answers of {other}", runs[ours], runs[other])


def _rows(what: str, runs: Sequence[Run]) -> Iterator[Row]:
    rate = statistics.median(len(run.answers) / run.seconds for run in runs)
    yield Row("peers", what, rate, "requests/s")
    seconds = np.concatenate([run.first_tokens for run in runs])
    for name, percentile in (("median", 50), ("95th percentile", 95)):
        value = float(np.percentile(seconds, percentile))
        yield Row("peers", f"{what}: time to first token, {name}", value, "s")


def _equality(what: str, expected: Sequence[Run], found: Sequence[Run]) -> Row:
    pairs = [
        pair
        for a, b in zip(expected, found, strict=True)
        for pair in zip(a.answers, b.answers, strict=True)
    ]
    for ours, theirs in pairs:
        if ours != theirs:
            logger.warning("%s: %r instead of %r", what, theirs, ours)
    equal = sum(ours == theirs for ours, theirs in pairs)
    label = f"{what} equal to ours: {equal} of {len(pairs)}"
    return Row("peers", label, 100 * equal / len(pairs), "%", at_least=100)
