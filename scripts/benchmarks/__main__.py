"""Measure what is promised of the engine: `python -m scripts.benchmarks [PART...] [--json FILE]`.

Prints one Markdown table under the machine's name: what was measured, the goal, and whether it is
met. Every ratio is of two figures from the same run, taken in turns, so that whatever else the
machine does meets both. A part is a function of `Options` that returns its rows:

http      demo checkpoint on two cores: 16 clients of Cog's server against one; one request through
          the engine against the same model without it
image   a mid-size random model: the second question about an image against the first
golden    what the original implementation computed, all at once, beside other requests
soak      random requests, good and bad, read, cancelled and left: slots, memory, outcomes
choices   the demo's scenes: right answers by `choices` against free ones; JSON by a schema
quantised the demo's scenes: right answers and drift of the logits by kind of quantisation
cpu       a mid-size random model against `transformers`
gpu       a random model of the released size, everything that a GPU is for (`benchmark_gpu.py`)
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import torch
import transformers
from PIL import Image
from torch import nn

import xgenmm
from scripts.benchmarks import gpu as benchmark_gpu
from scripts.benchmarks.figures import HEAD, Row
from scripts.demo_model import evaluation_set, fonts, scene, signs, wordings
from scripts.demo_model.evaluation_set import EVALUATION_SEED
from scripts.local_server import ROOT, LocalServer, predict, serving
from xgenmm.config import DecoderConfig, ResamplerConfig, VisionConfig, XGenMMConfig
from xgenmm.engine.answer import Answer
from xgenmm.engine.engine import Engine
from xgenmm.engine.reference import answer_text, prompt_embeddings
from xgenmm.engine.request import Request
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.errors import EngineError, InputError
from xgenmm.evaluation.engine_parity import check_engine
from xgenmm.models.quantization import QUANTIZATIONS, drift
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import Message
from xgenmm.preprocessing.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DEMO = ROOT / "weights" / "demo"
CORES = 2
CLIENTS = 16
LOAD_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """What a person may ask for.

    requests: how many, in place of a part's own number. scenes: of the demo's world.
    golden: a folder of golden folders; None for those of the tests. tiny: only see that `cpu` and
    `gpu` run, on any device.
    """

    requests: int | None = None
    scenes: int = 500
    golden: Path | None = None
    tiny: bool = False


# http: what many clients share, and what the engine costs one of them


ROUNDS = 3
SHORT = ("count", "existence", "place")


def http(options: Options) -> list[Row]:
    """16 clients of Cog's server against one, and one request with and without the engine."""
    conversations = _conversations(options.requests or ROUNDS * (4 + 2 * CLIENTS))
    captions = len(wordings.WORDINGS["caption"])
    with _cores(CORES):
        one, many = _served(conversations)
        mixed = [own[number % len(own)] for number, own in enumerate(conversations)]
        through, without = _latencies(mixed)
    relative = statistics.median(a / b for a, b in zip(through, without, strict=True))
    workload = f"on each image {captions} captions, then {len(SHORT)} short questions"
    return [
        Row("http", f"1 client ({workload})", one, "tokens/s"),
        Row("http", f"{CLIENTS} clients (the same)", many, "tokens/s"),
        Row("http", f"{CLIENTS} clients against 1", many / one, "x", at_least=4),
        Row("http", "1 request without the engine", 1e3 * statistics.median(without), "ms"),
        Row("http", "1 request through the engine", 1e3 * statistics.median(through), "ms"),
        Row("http", "through the engine against without", relative, "x", at_most=1.05),
    ]


def _conversations(count: int) -> list[list[Request]]:
    """Images, each with what one client asks about it, in turn."""
    found: list[list[Request]] = []
    for group in _groups(2 * count + 8):  # not every scene allows all kinds of questions
        asked = {case.kind: case.question for case in group}
        if asked.keys() >= {"caption", *SHORT}:
            questions = [*wordings.WORDINGS["caption"], *(asked[kind] for kind in SHORT)]
            images = group[0].images
            found.append([Request(question, images) for question in questions])
    return found[:count]


def _served(conversations: Sequence[Sequence[Request]]) -> tuple[float, float]:
    """Tokens a second of one client and of many: medians of rounds in turns.

    No two rounds show the same image, so that each one pays for its own.
    """
    bodies = iter([list(map(_body, own)) for own in conversations])
    share = max(1, len(conversations) // ROUNDS)
    environment = {
        "XGENMM_MODEL": "demo",
        "XGENMM_DEVICE": "cpu",
        "COG_MAX_CONCURRENCY": str(CLIENTS),
    }
    alone: list[float] = []
    together: list[float] = []
    with serving(environment) as server:
        server.wait_ready(LOAD_SECONDS)
        while parts := list(islice(bodies, share)):
            few = max(1, len(parts) // 9)  # it takes one client about as long
            alone.append(_rate(server, 1, parts[:few]))
            together.append(_rate(server, CLIENTS, parts[few:] or parts))
    return statistics.median(alone), statistics.median(together)


def _rate(server: LocalServer, clients: int, conversations: Sequence[Sequence[bytes]]) -> float:
    """Tokens a second while `clients` take these conversations, each when it has time."""
    with httpx.Client(base_url=server.url, timeout=None) as client:

        def talk(bodies: Sequence[bytes]) -> int:
            return sum(predict(client, body)["metrics"]["output_tokens"] for body in bodies)

        with ThreadPoolExecutor(clients) as pool:
            started = time.monotonic()
            tokens = sum(pool.map(talk, conversations))
            return tokens / (time.monotonic() - started)


def _body(request: Request) -> bytes:
    (image,) = request.images
    assert isinstance(image, Image.Image)
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return json.dumps({"input": {"image": url, "question": request.question}}).encode()


def _latencies(requests: Sequence[Request]) -> tuple[list[float], list[float]]:
    """Seconds of each request through an engine that keeps nothing, and without it."""
    engine = xgenmm.load("demo", device="cpu", cache_bytes=0)
    ways: list[Callable[[Request], str]] = [
        lambda request: engine.stream(request).text(),
        partial(answer_text, engine),
    ]
    seconds: tuple[list[float], list[float]] = ([], [])
    for way in ways:  # the first pass of a process is slower
        way(requests[0])
    for number, request in enumerate(requests):
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            started = time.monotonic()
            ways[which](request)
            seconds[which].append(time.monotonic() - started)
    engine.close()
    return seconds


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
    """This process and those that it starts have no more cores than these."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(before)[:count])
    torch.set_num_threads(min(count, threads))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


# image: an image is paid for once

MID_SIZE = XGenMMConfig(
    vision=VisionConfig("siglip", 384, 1536, 12, 6, image_size=384, patch_size=14),
    resampler=ResamplerConfig(num_latents=128, depth=6, num_heads=8, head_dim=48),
    decoder=DecoderConfig(
        vocab_size=704,  # the demo's words
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        initial_vocab=652,
    ),
)


def image(options: Options) -> list[Row]:
    """The time to the first token of a second question about an image against the first's."""
    torch.manual_seed(0)
    tokens = Tokenizer.from_folder(DEMO, MID_SIZE.text.convention, MID_SIZE.additional_ids)
    engine = Engine(XGenMM(MID_SIZE), tokens, max_num_seqs=1, cache_bytes=1 << 30)
    rng = random.Random(0)

    def first_token(shown: Image.Image, question: str) -> float:
        sampling = SamplingParams(max_new_tokens=1)
        answer = engine.stream(Request(question, [shown], sampling=sampling))
        answer.text()
        return answer.usage.time_to_first_token

    first: list[float] = []
    second: list[float] = []
    first_token(_noise(rng, (768, 768)), "Warm?")
    for _ in range(options.requests or 5):
        shown = _noise(rng, (768, 768))  # 2 x 2 tiles and the whole
        first.append(first_token(shown, "What is in this image?"))
        second.append(first_token(shown, "How many red shapes are there?"))
    engine.close()
    relative = statistics.median(b / a for a, b in zip(first, second, strict=True))
    what = "time to first token, 5 tiles"
    return [
        Row("image", f"{what}: first question", statistics.median(first), "s"),
        Row("image", f"{what}: second question", statistics.median(second), "s"),
        Row("image", "second against first", relative, "x", at_most=0.2),
    ]


def _noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))


# golden: everything at once


def golden(options: Options) -> list[Row]:
    """Every golden case through the scheduler at once, with neighbours of other settings."""
    compared = [
        one for folder in _golden_folders(options.golden) for one in check_engine(folder, 0)
    ]
    for one in compared:
        if one.found != one.expected:
            log.warning("%s: %s instead of %s", one.name, one.found, one.expected)
    rows = []
    for kind, what in ((True, "golden ids as the original's"), (False, "neighbours' as alone")):
        equal = [one.found == one.expected for one in compared if one.golden is kind]
        share = 100 * sum(equal) / len(equal)
        rows.append(Row("golden", f"{what}: {sum(equal)} of {len(equal)}", share, "%", 100))
    return rows


def _golden_folders(folder: Path | None) -> list[Path]:
    """The golden folders that hold a model. Raises InputError where there is none."""
    if folder is None:
        from tests.support import golden_data

        return [golden_data.folder(name) for name in ("v15_anyres", "v1_instruct")]
    found = sorted(file.parent for file in folder.glob("*/model.safetensors"))
    if not found:
        raise InputError("golden", f"{folder} has no folder with a model.safetensors in it")
    return found


# soak: whatever comes

SAMPLES = 40
"""How often the memory is looked at."""

ENDS = frozenset({"end", "stop", "length"})


@dataclass(frozen=True)
class Visit:
    """What one client does.

    request: makes what it asks, which may raise InputError already. ends: the outcomes that are
    right. pieces: of the answer, which it waits for; None: for all. cancels: after them, and it
    never looks back. in_a_loop: it reads in an event loop of its own, gone with the client.
    """

    name: str
    request: Callable[[], Request]
    ends: frozenset[str]
    pieces: int | None = None
    cancels: bool = False
    in_a_loop: bool = False


@dataclass(frozen=True)
class Soaked:
    """What became of the requests of a soak.

    outcomes: how often each stop reason came, and `refused` for an InputError.
    unexpected: which requests ended as they should not have. leaked: slots never freed.
    growth: the most resident memory after the first tenth, over what it was then.
    """

    outcomes: Counter[str]
    unexpected: list[str]
    leaked: int
    growth: float


def soak(options: Options) -> list[Row]:
    """Random requests to the demo checkpoint, in process."""
    count = options.requests or 20_000
    engine = xgenmm.load("demo", device="cpu", max_num_seqs=CLIENTS, cache_bytes=32 << 20)
    done = run_soak(engine, count, seed=0)
    for complaint in done.unexpected:
        log.warning("%s", complaint)
    ends = ", ".join(f"{number} {outcome}" for outcome, number in done.outcomes.most_common())
    total, growth = done.outcomes.total(), 100 * (done.growth - 1)
    return [
        Row("soak", f"accounted for ({ends})", total, "requests", count, count),
        Row(
            "soak", "ended otherwise than they should", len(done.unexpected), "requests", at_most=0
        ),
        Row("soak", "leaked", done.leaked, "slots", at_most=0),
        Row("soak", "growth of memory after the first tenth", growth, "%", at_most=5),
    ]


def run_soak(engine: Engine, requests: int, seed: int) -> Soaked:
    """Send random requests from twice as many clients as there are slots; then close the engine."""
    rng = random.Random(seed)
    shown = [_noise(rng, (rng.randint(8, 200), rng.randint(8, 200))) for _ in range(24)]
    process, memory = psutil.Process(), list[int]()
    outcomes, unexpected = Counter[str](), list[str]()
    with ThreadPoolExecutor(2 * engine.max_num_seqs) as pool:
        step = -(-requests // SAMPLES)
        for start in range(0, requests, step):
            numbers = range(start, min(start + step, requests))
            visits = [_visit(random.Random(f"{seed} {i}"), shown, engine) for i in numbers]
            for visit, begun in zip(visits, pool.map(partial(_pay, engine), visits), strict=True):
                outcome = _outcome(begun)
                outcomes[outcome] += 1
                if outcome not in visit.ends:
                    unexpected.append(f"{visit.name}: {outcome}")
            memory.append(process.memory_info().rss)
    engine.close()
    status = engine.status()
    leaked = status.running + status.waiting + engine.max_num_seqs - status.free_slots
    settled = memory[len(memory) // 10 :]
    return Soaked(outcomes, unexpected, leaked, max(settled) / settled[0])


def _pay(engine: Engine, visit: Visit) -> tuple[Answer, Iterator[str]] | None:
    """Ask and read as the client does; returns what it left unread, None if it was refused."""
    try:
        answer = engine.stream(visit.request())
    except InputError:
        return None
    pieces = iter(answer)
    with contextlib.suppress(EngineError, InputError):  # the outcome tells of it
        if visit.in_a_loop:
            whole = asyncio.run(_read(answer, visit.pieces))
            pieces = iter(()) if whole else pieces
        else:
            for _ in islice(pieces, visit.pieces):
                pass
    if visit.cancels:
        answer.cancel()
    return answer, pieces


async def _read(answer: Answer, count: int | None) -> bool:
    """Wait for `count` pieces; returns whether the answer ended before them."""
    number = 0
    async for _ in answer:
        number += 1
        if number == count:
            return False
    return True


def _outcome(begun: tuple[Answer, Iterator[str]] | None) -> str:
    if begun is None:
        return "refused"
    answer, rest = begun
    with contextlib.suppress(EngineError, InputError):
        for _ in rest:
            pass
    return answer.usage.stop_reason


def _visit(rng: random.Random, shown: Sequence[Image.Image], engine: Engine) -> Visit:
    if rng.random() < 0.15:
        name, bad = rng.choice(_bad_requests(rng, shown, engine))
        return Visit(name, bad, frozenset({"refused"}))
    request, kind, ends = _good_request(rng, shown), rng.random(), ENDS
    if request.timeout is not None:
        ends |= {"timeout"}
    if kind < 0.4:
        pieces, cancels = None, False
    else:
        pieces, cancels, ends = rng.choice((0, 1, rng.randint(2, 20))), kind < 0.9, ends
    if cancels:
        ends |= {"cancelled"}
    in_a_loop = pieces != 0 and rng.random() < 0.3
    return Visit(repr(request), lambda: request, ends, pieces, cancels, in_a_loop)


def _good_request(rng: random.Random, shown: Sequence[Image.Image]) -> Request:
    images = rng.sample(shown, rng.choice((0, 1, 1, 1, 2)))
    sampling = SamplingParams(max_new_tokens=rng.choice((1, rng.randint(2, 12), 48)))
    asked = Request("word " * rng.randint(1, 20) + "?", images, sampling=sampling)
    settings: dict[str, Any] = rng.choice(
        (
            {},
            {"temperature": rng.uniform(0.1, 2), "top_p": rng.uniform(0.1, 1)},
            {"temperature": 1.0, "top_k": rng.randint(1, 50), "seed": rng.randint(0, 9)},
            {"repetition_penalty": rng.uniform(0.5, 3)},
            {"num_beams": rng.randint(2, 4)},
            {"stop_sequences": (rng.choice("aeiou"),)},
        )
    )
    asked = replace(asked, sampling=replace(sampling, **settings))
    other: dict[str, Any] = rng.choice(
        (
            {},
            {},
            {"timeout": rng.uniform(0, 0.2)},
            {"choices": tuple(rng.sample(signs.COMMON_WORDS, rng.randint(1, 8)))},
            {"json_schema": rng.choice(SCHEMAS), "sampling": sampling},
            {"messages": (Message("user", "one"), Message("assistant", "two"))},
        )
    )
    # In a conversation images are placed.
    marks = "<image> " * len(images) if "messages" in other else ""
    return replace(asked, question=marks + asked.question, **other)


def _bad_requests(
    rng: random.Random, shown: Sequence[Image.Image], engine: Engine
) -> list[tuple[str, Callable[[], Request]]]:
    """Requests that have to be refused."""
    file = io.BytesIO()
    shown[0].save(file, "PNG")
    cut = file.getvalue()[: rng.randint(20, len(file.getvalue()) // 2)]
    too_long = "word " * engine.config.decoder.max_positions
    return [
        ("empty file", lambda: Request("?", [read_image(b"")])),
        ("no image", lambda: Request("?", [read_image(rng.randbytes(99))])),
        ("cut image", lambda: Request("?", [read_image(cut)])),
        ("nothing", lambda: Request(" ")),
        ("two marks for one image", lambda: Request("<image> <image>", shown[:1])),
        ("too long", lambda: Request(too_long, shown[:1])),
        ("temperature", lambda: Request("?", sampling=SamplingParams(temperature=9))),
        ("no token", lambda: Request("?", sampling=SamplingParams(max_new_tokens=0))),
        ("beams", lambda: Request("?", sampling=SamplingParams(num_beams=99))),
        ("empty stop", lambda: Request("?", sampling=SamplingParams(stop_sequences=("",)))),
        ("empty choice", lambda: Request("?", choices=("a", ""))),
        ("equal choices", lambda: Request("?", choices=("a", "a"))),
        ("choices and schema", lambda: Request("?", choices=("a",), json_schema={})),
        ("no schema", lambda: Request("?", json_schema={"type": "word"})),
    ]


# choices: one of several, and JSON

NAMES = tuple(f"{color} {kind}" for color in scene.COLORS for kind in scene.KINDS)
POSSIBLE: Mapping[str, Sequence[tuple[str, ...]]] = {
    "color": (scene.COLORS,),
    "shape": (scene.KINDS,),
    "count": (tuple("01234"),),
    "existence": (("yes", "no"),),
    "place": ((*NAMES, "sign", "nothing"),),
    "pair": (("yes", "no"), ("first", "second")),
}
"""All answers there are to a kind of question, of which some have two forms."""


def _object(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: tuple[dict[str, object], ...] = (
    _object(answer={"enum": [*NAMES, "sign", "nothing"]}),
    _object(count={"type": "integer", "minimum": 0, "maximum": 4}, certain={"type": "boolean"}),
    _object(sign={"type": "string", "pattern": "^[A-Z]{3,5}$"}, shape={"enum": [*scene.KINDS]}),
    _object(caption={"type": "string", "maxLength": 40}, share={"type": ["null", "boolean"]}),
    {"type": "array", "items": {"enum": [*scene.COLORS]}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"const": "nothing"}, _object(kind={"enum": [*scene.KINDS]})]},
    {
        "$defs": {"shape": _object(color={"enum": [*scene.COLORS]}, kind={"enum": [*scene.KINDS]})},
        "type": "array",
        "items": {"$ref": "#/$defs/shape"},
        "maxItems": 3,
    },
)
"""Schemas whose answers cannot go on for ever: what the context cuts off is no JSON."""


def choices(options: Options) -> list[Row]:
    """How often `choices` and free answers are right, and `json_schema` is kept to."""
    engine = xgenmm.load("demo", device="cpu", max_num_seqs=CLIENTS)
    right: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind in POSSIBLE}

    def ask(group: Sequence[evaluation_set.Case]) -> list[tuple[str, bool, bool]]:
        images, found = group[0].images, []
        for case in group:
            if case.kind in POSSIBLE:
                possible = next(each for each in POSSIBLE[case.kind] if case.answer in each)
                free = Request(case.question, images)
                chosen = engine.stream(replace(free, choices=possible)).text() == case.answer
                was_right = engine.stream(free).text().lower() == case.answer
                found.append((case.kind, chosen, was_right))
        return found

    def valid(number: int) -> bool:
        schema, group = SCHEMAS[number % len(SCHEMAS)], groups[number % len(groups)]
        validator = jsonschema.Draft202012Validator(schema)
        sampling = SamplingParams(temperature=number % 2, seed=number)
        case = group[number % len(group)]
        text = engine.stream(
            Request(case.question, case.images, sampling=sampling, json_schema=schema)
        ).text()
        try:
            kept = validator.is_valid(json.loads(text))
        except ValueError:  # no JSON at all
            kept = False
        if not kept:
            log.warning("%r breaks %s", text, schema)
        return kept

    groups = _groups(options.scenes)
    with ThreadPoolExecutor(engine.max_num_seqs) as pool:
        for group_found in pool.map(ask, groups):
            for kind, chosen, free in group_found:
                right[kind].append((chosen, free))
        answers = list(pool.map(valid, range(options.requests or 500)))
    engine.close()
    right["all"] = [pair for pairs in right.values() for pair in pairs]
    rows = []
    for kind, pairs in right.items():
        chosen, free = (100 * sum(which) / len(pairs) for which in zip(*pairs, strict=True))
        what = f"{kind}: right by choices ({len(pairs)} questions; free answers {free:.1f} %)"
        rows.append(Row("choices", what, chosen, "%", at_least=free if kind == "all" else None))
    share = 100 * sum(answers) / len(answers)
    what = f"JSON answers valid: {sum(answers)} of {len(answers)}, {len(SCHEMAS)} schemas"
    return [*rows, Row("choices", what, share, "%", at_least=100)]


# quantised: what narrower weights cost

INT4 = "int4"  # not a kind that the engine has: see docs/benchmarks.md
INT4_GROUP = 32  # neighbours in a feature that share a scale


def quantised(options: Options) -> list[Row]:
    """Right answers of the demo by kind of quantisation, and how far its first logits drift."""
    groups = _groups(options.scenes)
    rows: list[Row] = []
    exact = torch.empty(0)
    for kind in (None, *QUANTIZATIONS, INT4):
        stored = None if kind == INT4 else kind
        engine = xgenmm.load("demo", device="cpu", max_num_seqs=CLIENTS, quantize=stored)
        if kind == INT4:
            _round_to_int4(engine)
        with ThreadPoolExecutor(engine.max_num_seqs) as pool:
            right = [one for found in pool.map(partial(_right, engine), groups) for one in found]
        logits = torch.cat([_first_logits(engine, group[0]) for group in groups])
        engine.close()
        name = kind or "float32"
        share = 100 * sum(right) / len(right)
        rows.append(Row("quantised", f"{name}: right ({len(right)} questions)", share, "%"))
        if kind is None:
            exact = logits
            continue
        moved = drift(exact, logits)
        rows += [
            Row("quantised", f"{name}: drift of the logits", 100 * moved.relative, "%"),
            Row("quantised", f"{name}: same first token", 100 * moved.agreement, "%"),
        ]
    return rows


def _round_to_int4(engine: Engine) -> None:
    """Round the weights of the decoder's layers as 4 bits would: what that costs, not saves."""
    for module in engine.model.decoder.model.layers.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.unflatten(1, (-1, INT4_GROUP))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
            module.weight.data = ((groups / scale).round() * scale).flatten(1)


def _right(engine: Engine, group: Sequence[evaluation_set.Case]) -> list[bool]:
    images = group[0].images
    answers = [engine.stream(Request(case.question, images)) for case in group]
    return [
        answer.text().lower() == case.answer.lower()
        for answer, case in zip(answers, group, strict=True)
    ]


def _first_logits(engine: Engine, case: evaluation_set.Case) -> torch.Tensor:
    """Logits [1, vocab] of the first token of an answer."""
    embeds = prompt_embeddings(engine, Request(case.question, case.images))
    return engine.model.prefill([embeds], engine.model.cache(1, embeds.shape[0]))


def _groups(scenes: int) -> list[list[evaluation_set.Case]]:
    """The demo's evaluation set: the questions on each image or pair."""
    cases = evaluation_set.evaluation_set(EVALUATION_SEED, fonts.held_out_fonts(), scenes)
    return [list(group) for _, group in groupby(cases, key=lambda case: case.scenes)]


# The program

PARTS: Mapping[str, Callable[[Options], list[Row]]] = {
    "http": http,
    "image": image,
    "golden": golden,
    "soak": soak,
    "choices": choices,
    "quantised": quantised,
    "cpu": lambda options: benchmark_gpu.cpu(tiny=options.tiny),
    "gpu": lambda options: benchmark_gpu.gpu(tiny=options.tiny),
}


def machine() -> str:
    """The machine's name and the versions, as a figure needs them."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    cores = len(os.sched_getaffinity(0))
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{device}{cpu}, {cores} cores, Python {platform.python_version()}, {versions}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status, 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all")
    parser.add_argument("--requests", type=int, help="instead of each part's own number")
    parser.add_argument("--scenes", type=int, default=500, help="of the demo's world")
    parser.add_argument("--golden", type=Path, help="a folder of golden folders")
    parser.add_argument("--tiny", action="store_true", help="of cpu and gpu: only see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - {*PARTS, "all"}:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)} and all")
    everywhere = [name for name in PARTS if name != "gpu" or torch.cuda.is_available()]
    names = everywhere if not given.parts or "all" in given.parts else given.parts
    if "gpu" in names and not (given.tiny or torch.cuda.is_available()):
        parser.error("gpu: PyTorch sees no GPU here; with --tiny it runs, and measures nothing")
    if given.golden is not None:
        try:
            _golden_folders(given.golden)
        except InputError as error:
            parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = Options(given.requests, given.scenes, given.golden, given.tiny)
    print(f"{machine()}\n\n{HEAD}")
    rows: list[Row] = []
    for name in names:
        for row in PARTS[name](options):
            print(row, flush=True)
            rows.append(row)
    if given.markdown:
        table = "\n".join([HEAD, *map(str, rows)])
        given.markdown.write_text(f"{machine()}\n\n{table}\n")
    if given.json:
        figures = [asdict(row) | {"met": row.met} for row in rows]
        given.json.write_text(json.dumps({"machine": machine(), "rows": figures}, indent=1) + "\n")
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
