"""The parts `gpu` and `cpu` of `python -m scripts.benchmarks`: speed and memory of the bare model.

`gpu` takes random weights of the released size, made here, as speed does not depend on their
values. It measures the device's own ceilings first, then the model, the HTTP server on it, and
`transformers` on the same decoder weights: as the published packagings run it (eager `generate`,
float32 and bfloat16), and with a static cache and `torch.compile`.

`cpu` compares a mid-size float32 model with `transformers` on two cores: both take turns in this
one process, and of each the best round counts, as other work on the machine only ever makes a round
slower. `tiny` is all of it in a minute, on any device, and its figures mean nothing.
"""

import base64
import dataclasses
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import httpx
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

from scripts.benchmarks.figures import Row
from scripts.local_server import ROOT, predict, serving
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import DecoderConfig, ResamplerConfig, TilingConfig, VisionConfig, XGenMMConfig
from xgenmm.evaluation.parity import all_logits
from xgenmm.kernels.cuda_graphs import Decode, build_decode_step
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import Phi3Decoder
from xgenmm.models.phi3_huggingface import to_transformers
from xgenmm.models.quantization import QUANTIZATIONS, check_quantization, drift
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import tile_image

log = logging.getLogger(__name__)

SMALL = XGenMMConfig(
    VisionConfig("siglip", 16, 16, 1, 1, 28, 14),
    ResamplerConfig(4, 1, 1, 16),
    DecoderConfig(704, 32, 48, 2, 2, 1024, initial_vocab=652),
    TilingConfig(grids=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))),
)
DEMO = ROOT / "weights" / "demo"
CLIENTS = (1, 16, 64)
LOAD_SECONDS = 300.0
UNLIMITED = httpx.Limits(max_connections=None)
MID_DECODER = DecoderConfig(hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=8)
MID_VISION = VisionConfig("siglip", 384, 1536, 12, 6)


@dataclass(frozen=True)
class Size:
    """How much is measured. `rows` are batch sizes, `context` positions, `text` a question's ids.

    copy: bytes of the copy that shows the bandwidth. matrix: side of the matrix product.
    """

    config: XGenMMConfig
    rows: tuple[int, ...]
    context: int
    tokens: int
    text: int
    image: tuple[int, int]
    copy: int
    matrix: int
    rounds: int


FULL = Size(XGenMMConfig(), (1, 8, 32, 64), 800, 64, 32, (1600, 1200), 2**31, 8192, 5)
TINY = Size(SMALL, (1, 3), 40, 4, 8, (80, 60), 2**20, 64, 2)


class Device:
    """Timing and memory of the device under test."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32

    def wait(self) -> None:
        """Until all work that was asked for is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Median of `rounds` after one for warming up."""
        times = []
        for _ in range(rounds + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    @contextmanager
    def peak(self) -> Iterator[list[float]]:
        """Gives a list that holds the peak of device memory in GB after the block."""
        found: list[float] = []
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield found
        found.append(torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0)


def random_model(config: XGenMMConfig, device: torch.device, dtype: torch.dtype) -> XGenMM:
    """Weights as a fresh training has them, made on the device."""
    with torch.device("meta"):
        model = XGenMM(config)
    model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if parameter.ndim > 1:
            values.normal_(0, 0.02)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


class Moments(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or several."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def their_times(
    theirs: Phi3ForCausalLM, embeds: torch.Tensor, tokens: int, **options: Any
) -> tuple[float, float]:
    """Seconds to the first token of `generate`, and from each to the next (its host waits)."""
    moments = Moments()
    started = time.perf_counter()
    with torch.inference_mode():
        cast(Any, theirs).generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=moments,
            **options,
        )
    times = moments.times[-tokens:]
    return times[0] - started, (times[-1] - times[0]) / (tokens - 1)


# Ceilings


def ceilings(device: Device, size: Size) -> tuple[float, float, list[Row]]:
    """Bytes a second of a copy, both ways counted; operations a second of a matrix product."""
    source = torch.ones(size.copy, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    copy = 2 * size.copy / device.seconds(lambda: target.copy_(source), size.rounds)
    a, b = (
        torch.randn(size.matrix, size.matrix, device=device.device, dtype=device.dtype)
        for _ in range(2)
    )
    product = 2 * size.matrix**3 / device.seconds(lambda: a @ b, size.rounds)
    return (
        copy,
        product,
        [
            Row("ceilings", "copy, read and written", copy / 1e9, "GB/s"),
            Row("ceilings", f"matrix product, {device.dtype}", product / 1e12, "TFLOP/s"),
        ],
    )


# Decode


def weight_bytes(decoder: Phi3Decoder) -> int:
    """What one decode step must read of the weights: all but the embeddings."""
    state = decoder.state_dict()
    tensors = (tensor for name, tensor in state.items() if "embed" not in name)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cache_bytes(cache: KVCache, rows: int, context: int) -> int:
    """What one decode step must read of the cache."""
    layers, _, heads, _, head_dim = cache.keys.shape
    return 2 * layers * rows * heads * context * head_dim * cache.keys.element_size()


def decode_seconds(
    device: Device, model: XGenMM, cache: KVCache, step: Decode, rows: int, size: Size
) -> float:
    """Seconds of a step of `rows` rows that grow from `size.context`, greedy, on the device."""
    start = size.context - size.tokens // 2

    def run() -> None:
        tokens = torch.zeros(rows, dtype=torch.int64, device=device.device)
        positions = torch.full_like(tokens, start)
        for number in range(size.tokens):
            tokens = step(tokens, positions, cache, start + number + 1).argmax(-1)
            positions += 1

    with torch.inference_mode():
        return device.seconds(run, size.rounds) / size.tokens


def decoding(device: Device, model: XGenMM, size: Size, copy: float) -> list[Row]:
    """Decode rates of each batch size against what the bandwidth allows."""
    cache = model.cache(max(size.rows), size.context + size.tokens)
    step = build_decode_step(model, cache)
    found = []
    for rows in size.rows:
        seconds = decode_seconds(device, model, cache, step, rows, size)
        must = weight_bytes(model.decoder) + cache_bytes(cache, rows, size.context)
        goal = {1: 88.0, 32: 70.0}.get(rows)
        found += [
            Row("decode", f"batch {rows}, context {size.context}", rows / seconds, "tokens/s"),
            Row(
                "decode",
                f"batch {rows}, of what the copy bandwidth allows",
                100 * must / copy / seconds,
                "%",
                at_least=goal,
            ),
        ]
    return found


# First tokens


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A photograph-like file: smooth colours with noise."""
    torch.manual_seed(seed)
    coarse = (torch.rand(12, 16, 3) * 255).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def embed(model: XGenMM, files: Sequence[bytes], text: int) -> torch.Tensor:
    """The fused prompt of these images and a question of `text` ids, from encoded files."""
    side = model.config.vision.image_size
    images = [tile_image(read_image(file), model.config.tiling, side) for file in files]
    ids = tuple(range(len(files) + text))
    prompt = Prompt(ids, tuple((number, 1) for number in range(len(files))))
    return model.merge_multimodal_embeddings(prompt, model.encode(images, prompt))


def first_tokens(device: Device, model: XGenMM, size: Size) -> tuple[float, list[Row]]:
    """Seconds of a one-word answer, and the rows: bytes of images -> first token."""
    config = model.config
    tiles = config.resampler.num_latents
    cache = model.cache(1, 4 * 5 * tiles + 2 * size.text + 8)
    step = build_decode_step(model, cache)
    large = [jpeg(size.image, seed) for seed in range(4)]

    def first(files: Sequence[bytes]) -> torch.Tensor:
        return model.prefill([embed(model, files, size.text)], cache).argmax(-1)

    def one_word() -> None:
        token = first(large[:1])
        length = 5 * tiles + size.text
        int(token)
        int(step(token, torch.full_like(token, length), cache, length + 1).argmax(-1))

    def second() -> None:
        ids = model.embed_ids(list(range(size.text)))
        int(model.prefill_chunk([ids], [5 * tiles], None, cache).argmax(-1))

    squashed = dataclasses.replace(config.tiling, mode="squash")
    one_tile = dataclasses.replace(config, tiling=squashed)

    def single() -> None:
        model.config = one_tile
        int(first(large[:1]))
        model.config = config

    with torch.inference_mode():
        word = device.seconds(one_word, size.rounds)
        milliseconds = {
            "1 tile": device.seconds(single, size.rounds),
            "1 large image, 5 tiles": device.seconds(lambda: int(first(large[:1])), size.rounds),
            "4 large images, 20 tiles": device.seconds(lambda: int(first(large)), size.rounds),
            "second question on the same image": device.seconds(second, size.rounds),
        }
    goals = {"1 large image, 5 tiles": 40.0, "second question on the same image": 10.0}
    rows = [
        Row("first token", f"{name}, from JPEG bytes", 1e3 * seconds, "ms", at_most=goals.get(name))
        for name, seconds in milliseconds.items()
    ]
    return word, [*rows, Row("answer", "one word, from JPEG bytes", 1e3 * word, "ms", at_most=50.0)]


def vision(device: Device, model: XGenMM, size: Size, product: float) -> list[Row]:
    """Tower and sampler against the rate of the matrix product."""
    file = jpeg(size.image, 0)
    image = tile_image(read_image(file), model.config.tiling, model.config.vision.image_size)

    def encode() -> None:
        model.encode([image])

    with FlopCounterMode(display=False) as counter:
        encode()
    seconds = device.seconds(encode, size.rounds)
    rate = counter.get_total_flops() / seconds
    return [
        Row("vision", "tower and sampler, 5 tiles", 1e3 * seconds, "ms"),
        Row("vision", "of the matrix product's rate", 100 * rate / product, "%", at_least=50.0),
    ]


# Loading, memory and quantised weights


def loading(
    device: Device, folder: Path, size: Size, kind: str | None
) -> tuple[XGenMM, float, list[Row]]:
    """A model read from `folder`, its seconds a token at batch 1, and what that took."""
    with torch.device("meta"):
        model = XGenMM(size.config)
    name = kind or str(device.dtype).removeprefix("torch.")
    with device.peak() as peak:
        started = time.perf_counter()
        load_parameters(model, folder, device=device.device, dtype=device.dtype, quantize=kind)
        device.wait()
        loaded = time.perf_counter()
        model.eval().requires_grad_(False)
        cache = model.cache(1, size.config.decoder.max_positions)
        step = build_decode_step(model, cache)
        device.wait()
        ready = time.perf_counter()
        embeds = embed(model, [jpeg(size.image, 0)], size.text)
        int(model.prefill([embeds], cache).argmax(-1))
        seconds = decode_seconds(device, model, cache, step, 1, size)
    limit = {"bfloat16": 11.0, "int8": 7.0}.get(name)
    rows = [
        Row("start", f"{name}: read from the page cache to the device", loaded - started, "s"),
        Row("start", f"{name}: kernels and graphs", ready - loaded, "s"),
        Row("memory", f"{name}: peak with one stream", peak[0], "GB", at_most=limit),
    ]
    return model, seconds, rows


def quantising(device: Device, folder: Path, size: Size) -> tuple[XGenMM, list[Row]]:
    """The plain model, and what each kind of quantisation changes."""
    model, plain, found = loading(device, folder, size, None)
    torch.manual_seed(1)
    embeds = torch.randn(64, size.config.decoder.hidden_size, device=device.device) * 0.02
    embeds = embeds.to(device.dtype)
    exact = all_logits(model, embeds)
    if device.cuda:
        model.to("cpu")  # what another kind needs is measured alone
    for kind in QUANTIZATIONS:
        try:
            check_quantization(kind, device.device)
        except ValueError as error:
            log.warning("%s", error)
            continue
        other, seconds, rows = loading(device, folder, size, kind)
        moved = drift(exact, all_logits(other, embeds))
        del other
        found += [
            *rows,
            Row("quantised", f"{kind}: decode, batch 1", 1 / seconds, "tokens/s"),
            Row("quantised", f"{kind}: against bfloat16", plain / seconds, "x", at_least=1.6),
            Row("quantised", f"{kind}: drift of the logits", 100 * moved.relative, "%"),
            Row("quantised", f"{kind}: same most likely token", 100 * moved.agreement, "%"),
        ]
    return model.to(device.device), found


def correctness(device: Device, model: XGenMM, size: Size) -> list[Row]:
    """A decode step against float32 on the same weights."""
    torch.manual_seed(2)
    length = size.context // 4
    embeds = (torch.randn(length, size.config.decoder.hidden_size) * 0.02).to(device.device)
    token = torch.tensor([5], device=device.device)
    positions = torch.full_like(token, length)
    logits = []
    for dtype in (torch.float32, device.dtype):
        model.to(dtype)
        cache = model.cache(1, length + 1)
        model.prefill([embeds.to(dtype)], cache)
        step = build_decode_step(model, cache) if dtype == device.dtype else model.decode
        logits.append(step(token, positions, cache, length + 1).clone())
    error = drift(*logits).relative
    return [Row("correctness", "logits against float32, relative", error, at_most=2e-2)]


# Beside


def beside(device: Device, model: XGenMM, size: Size, word: float) -> list[Row]:
    """`transformers` on the same weights. Changes the model's dtype, so it comes last."""
    found = []
    large = jpeg(size.image, 0)
    width = size.config.decoder.hidden_size
    torch.manual_seed(3)
    embeds = (torch.randn(1, size.context, width) * 0.02).to(device.device)
    for dtype in dict.fromkeys((device.dtype, torch.float32)):
        model.to(dtype)
        theirs = to_transformers(model.decoder, dtype)
        name = f"transformers {str(dtype).removeprefix('torch.')}"
        prompt = embeds.to(dtype)
        their_times(theirs, prompt, 4)
        rounds = [their_times(theirs, prompt, size.tokens) for _ in range(2)]
        found.append(
            Row(name, "decode, batch 1", 1 / min(token for _, token in rounds), "tokens/s")
        )

        def answer(theirs: Phi3ForCausalLM = theirs) -> None:
            with torch.inference_mode():
                their_times(theirs, embed(model, [large], size.text)[None], 2)

        seconds = device.seconds(answer, size.rounds)
        found.append(Row(name, "one word, from JPEG bytes", 1e3 * seconds, "ms"))
        if dtype == torch.float32:
            goal = 15.0 if device.cuda else None
            found.append(Row(name, "one word, against ours", seconds / word, "x", at_least=goal))
        if device.cuda and dtype == device.dtype:
            # `generate` compiles the decode step by itself where the cache is static.
            options = {"cache_implementation": "static"}
            for _ in range(2):
                their_times(theirs, prompt, size.tokens, **options)
            _, token = their_times(theirs, prompt, size.tokens, **options)
            found.append(Row(f"{name}, static cache, compiled", "decode, batch 1", 1 / token))
        del theirs
    return found


def gpu(*, tiny: bool = False) -> list[Row]:
    """Everything, in the order in which memory allows it."""
    started = time.perf_counter()
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    size = TINY if tiny else FULL
    copy, product, rows = ceilings(device, size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows += served(device, folder, size)
        write_weights(device, folder, size.config)
        model, found = quantising(device, folder, size)
    rows += found
    rows += decoding(device, model, size, copy)
    word, found = first_tokens(device, model, size)
    rows += found
    rows += vision(device, model, size, product)
    rows += correctness(device, model, size)
    rows += beside(device, model, size, word)
    seconds = time.perf_counter() - started
    return [*rows, Row("all", "this part", seconds, "s", at_most=480.0)]


# The HTTP server


def write_weights(device: Device, folder: Path, config: XGenMMConfig) -> None:
    """Random weights as a checkpoint's file."""
    made = random_model(config, device.device, device.dtype)
    save_file(made.state_dict(), folder / "model.safetensors")


def served(device: Device, folder: Path, size: Size) -> list[Row]:
    """Cog's server: how long it takes to start, and requests a second of many clients.

    The model has the demo's words, as a server needs a tokenizer; the rest is of full size.
    """
    words = read_config(DEMO).decoder
    decoder = dataclasses.replace(
        size.config.decoder, vocab_size=words.vocab_size, initial_vocab=words.initial_vocab
    )
    config = dataclasses.replace(size.config, decoder=decoder)
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(DEMO / name, folder)
    described = {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "vision_encoder_config": asdict(config.vision),
        "vision_tokenizer_config": asdict(config.resampler),
        "text_config": asdict(config.decoder),
    }
    (folder / "config.json").write_text(json.dumps(described))
    grids = {"grids": config.tiling.grids}
    (folder / "preprocessor_config.json").write_text(json.dumps(grids))
    write_weights(device, folder, config)
    environment = {
        "XGENMM_MODEL": str(folder),
        "XGENMM_DEVICE": device.device.type,
        "COG_MAX_CONCURRENCY": str(max(CLIENTS)),
    }
    images = [
        f"data:image/jpeg;base64,{base64.b64encode(jpeg(size.image, seed)).decode()}"
        for seed in range(4)
    ]
    with serving(environment) as server:
        ready = server.wait_ready(LOAD_SECONDS)
        setup = server.health()["setup"]
        begun, done = (
            datetime.fromisoformat(setup[name]) for name in ("started_at", "completed_at")
        )
        rows = [
            Row("server", "process start to READY", ready, "s", at_most=12.0),
            Row("server", "of that setup()", (done - begun).total_seconds(), "s", at_most=5.0),
        ]
        with httpx.Client(base_url=server.url, timeout=None, limits=UNLIMITED) as client:

            def ask(number: int) -> None:
                given = {"image": images[number % len(images)], "max_new_tokens": size.tokens}
                body = {"input": {**given, "question": f"What is number {number}?"}}
                predict(client, json.dumps(body).encode())

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


# Without a GPU


def cpu(*, tiny: bool = False) -> list[Row]:
    """The decoder against `transformers` in float32, by turns.

    The tower is transformers' own, so there is nothing to compare.
    """
    config = dataclasses.replace(SMALL, vision=MID_VISION, decoder=MID_DECODER)
    size = TINY if tiny else dataclasses.replace(FULL, config=config, tokens=24)
    rounds = 2 if tiny else 6
    model = random_model(size.config, torch.device("cpu"), torch.float32)
    theirs = to_transformers(model.decoder, torch.float32)
    torch.manual_seed(4)
    embeds = torch.randn(1, size.context, size.config.decoder.hidden_size) * 0.02
    best = [float("inf")] * 4
    for _ in range(rounds):
        times = (
            *our_times(model, embeds[0], size.tokens),
            *their_times(theirs, embeds, size.tokens),
        )
        best = [min(pair) for pair in zip(best, times, strict=True)]
    prefill, token, their_prefill, their_token = best
    return [
        Row("cpu", f"prefill of {size.context}", 1e3 * prefill, "ms"),
        Row("cpu", f"prefill of {size.context}, transformers", 1e3 * their_prefill, "ms"),
        Row("cpu", "prefill, times as fast", their_prefill / prefill, "x", at_least=1.0),
        Row("cpu", "decode step", 1e3 * token, "ms"),
        Row("cpu", "decode step, transformers", 1e3 * their_token, "ms"),
        Row("cpu", "decode, times as fast", their_token / token, "x", at_least=1.3),
    ]


def our_times(model: XGenMM, embeds: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, the cache's making included, and from each to the next."""
    length = embeds.shape[0]
    started = time.perf_counter()
    cache = model.cache(1, length + tokens)
    step = build_decode_step(model, cache)
    token = model.prefill([embeds], cache).argmax(-1)
    int(token)
    first = time.perf_counter()
    for number in range(tokens - 1):
        position = length + number
        token = step(token, token.new_tensor([position]), cache, position + 1).argmax(-1)
        int(token)
    return first - started, (time.perf_counter() - first) / (tokens - 1)
