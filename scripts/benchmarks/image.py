"""The parts `image` and `clip`: the first token of a second question against that of the first."""

import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat

import torch
from PIL import Image

from scripts.benchmarks.random_data import DEMO, noise_image
from scripts.benchmarks.report import Options, Row
from xgenmm import Engine, Request, SamplingParams
from xgenmm.config import (
    DecoderConfig,
    ResamplerConfig,
    TemporalConfig,
    TilingConfig,
    VisionConfig,
    XGenMMConfig,
)
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tokenizer import Tokenizer

MID_SIZE = XGenMMConfig(
    vision=VisionConfig("siglip", 384, 1536, 12, 6, image_size=384, patch_size=14),
    resampler=ResamplerConfig(num_latents=128, depth=6, num_heads=8, head_dim=48),
    decoder=DecoderConfig(
        vocab_size=704,  # of the demo's tokenizer
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        initial_vocab=652,
    ),
)


def image(options: Options) -> list[Row]:
    """Measure a mid-size random model, whose second question finds the image's features cached."""
    requests = (
        Request("", [noise])
        for noise in _noise((768, 768))  # 2 x 2 tiles and the whole image
    )
    return _second_against_first("image", "5 tiles", MID_SIZE, requests, options, at_most=0.2)


def clip(options: Options) -> list[Row]:
    """The same for a video model and clips of 8 frames, given as decoded images."""
    config = replace(MID_SIZE, temporal=TemporalConfig(), tiling=TilingConfig("pad", ()))
    frames = _noise((640, 360))
    requests = (Request("", video=list(islice(frames, 8))) for _ in repeat(None))
    return _second_against_first("clip", "8 frames", config, requests, options, at_most=0.05)


def _noise(size: tuple[int, int]) -> Iterator[Image.Image]:
    rng = random.Random(0)
    return (noise_image(rng, size) for _ in repeat(None))


def _second_against_first(
    part: str,
    shown: str,
    config: XGenMMConfig,
    requests: Iterator[Request],
    options: Options,
    at_most: float,
) -> list[Row]:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_folder(DEMO, config.text.convention, config.additional_ids)
    engine = Engine(XGenMM(config), tokenizer, max_num_seqs=1, cache_bytes=1 << 30)

    def first_token(request: Request, question: str) -> float:
        sampling = SamplingParams(max_new_tokens=1)
        answer = engine.stream(replace(request, question=question, sampling=sampling))
        answer.text()
        return answer.usage.time_to_first_token

    first: list[float] = []
    second: list[float] = []
    first_token(next(requests), "Warm?")
    for request in islice(requests, options.requests or 5):
        first.append(first_token(request, f"What is in this {part}?"))
        second.append(first_token(request, "How many red shapes are there?"))
    engine.close()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    what = f"time to first token, {shown}"
    return [
        Row(part, f"{what}: first question", statistics.median(first), "s"),
        Row(part, f"{what}: second question", statistics.median(second), "s"),
        Row(part, "second against first", ratio, "x", at_most=at_most),
    ]
