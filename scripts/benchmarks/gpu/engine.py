"""The engine as its callers see it: first tokens, and many requests at once."""

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import Figure
from xgenmm import Engine, Request, SamplingParams, Usage

WORD = " word"


def engine(context: Context) -> Iterator[Figure]:
    """Measure an engine with the settings of a server."""
    started = time.perf_counter()
    engine = Engine(context.model, context.tokenizer, max_num_seqs=context.size.requests)
    try:
        engine.warm_up()
        seconds = time.perf_counter() - started
        yield Figure(f"start with the {engine.status().decode_path} decode path", seconds, "s")
        yield from _one_request(context, engine)
        yield from _new_lengths(context, engine)
        yield _many_requests(context, engine)
    finally:
        engine.close()


def answer_seconds(engine: Engine, image: bytes, question: str, tokens: int) -> float:
    """Seconds from an image's bytes to an answer of at most `tokens` tokens."""
    started = time.perf_counter()
    tiles = engine.preprocess_image(image)
    sampling = SamplingParams(max_new_tokens=tokens)
    engine.stream(Request(question, [tiles], sampling=sampling)).text()
    return time.perf_counter() - started


def token_seconds(context: Context, engine: Engine) -> float:
    """Seconds from one token to the next, of one stream with a prompt of 5 tiles."""
    size = context.size
    times = []
    for number in range(300, 300 + size.rounds):
        image, sampling = context.image(number), SamplingParams(max_new_tokens=size.tokens)
        request = Request(WORD, [engine.preprocess_image(image)], sampling=sampling)
        started = time.perf_counter()
        answer = engine.stream(request)
        answer.text()
        usage = answer.usage
        rest = time.perf_counter() - started - usage.time_to_first_token
        times.append(rest / max(1, usage.output_tokens - 1))
    return statistics.median(times)


def _one_request(context: Context, engine: Engine) -> Iterator[Figure]:
    """Measure one request at a time. Each round has an image of its own."""
    size = context.size
    question = WORD * size.text
    first, second, word = [], [], []
    for number in range(100, 100 + size.rounds):
        image = context.image(number)
        first.append(answer_seconds(engine, image, question, 1))
        second.append(answer_seconds(engine, image, f"other {question}", 1))
        word.append(answer_seconds(engine, context.image(number + 100), question, 2))
    yield Figure("first token, 5 tiles, from JPEG bytes", *_ms(first))
    yield Figure("second question on the image", *_ms(second))
    yield Figure("one-word answer, from JPEG bytes", *_ms(word))
    token = token_seconds(context, engine)
    yield Figure("time between tokens, 1 stream", 1e3 * token, "ms", {"tokens/s": 1 / token})


def _new_lengths(context: Context, engine: Engine) -> Iterator[Figure]:
    """Measure first tokens of prompts of lengths that the engine has not seen, and then has.

    What a library prepares for each length, such as a plan for attention, is in the first only.
    """
    lengths = [17 + 13 * number for number in range(context.size.lengths)]
    for start, name in ((400, "a new length each"), (800, "the same lengths again")):
        seconds = [
            answer_seconds(engine, context.image(start + length), WORD * length, 1)
            for length in lengths
        ]
        details = {
            f"ms with {length} words": 1e3 * value
            for length, value in zip(lengths, seconds, strict=True)
        }
        details["ms at most"] = 1e3 * max(seconds)
        yield Figure(f"first token, {name}: median", *_ms(seconds), details)


def _many_requests(context: Context, engine: Engine) -> Figure:
    """Measure as many requests at once as the engine takes, each with an image of its own."""
    size = context.size
    images = [context.image(2000 + number) for number in range(size.requests)]
    sampling = SamplingParams(max_new_tokens=size.tokens)

    def ask(image: bytes) -> tuple[Usage, list[float]]:
        """Returns when each piece of text came, too."""
        tiles = engine.preprocess_image(image)
        answer = engine.stream(Request(WORD * size.text, [tiles], sampling=sampling))
        return answer.usage, [time.perf_counter() for _ in answer]

    started = time.perf_counter()
    with ThreadPoolExecutor(size.requests) as pool:  # one for each, as in Cog's server
        answers = list(pool.map(ask, images))
    seconds = time.perf_counter() - started
    output_tokens = sum(usage.output_tokens for usage, _ in answers)
    first_tokens = [usage.time_to_first_token for usage, _ in answers]
    gaps = [later - earlier for _, times in answers for earlier, later in pairwise(times)]
    details = {
        "tokens/s": output_tokens / seconds,
        "ms to the first token, median": 1e3 * statistics.median(first_tokens),
        "ms to the first token, 95 %": 1e3 * _percentile(first_tokens, 95),
        "ms between pieces, median": 1e3 * _percentile(gaps, 50),
        "ms between pieces, 95 %": 1e3 * _percentile(gaps, 95),
    }
    rate = size.requests / seconds
    return Figure(f"{size.requests} requests at once", rate, "requests/s", details)


def _ms(seconds: Sequence[float]) -> tuple[float, str]:
    return 1e3 * statistics.median(seconds), "ms"


def _percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of the values do not exceed; 0 without values."""
    return sorted(values)[-(-len(values) * percent // 100) - 1] if values else 0.0
