"""The part `image`: the first token of a second question on an image against the first."""

import random
import statistics

import torch
from PIL import Image

from scripts.benchmarks.random_data import DEMO, noise_image
from scripts.benchmarks.report import Options, Row
from xgenmm import Engine, Request, SamplingParams
from xgenmm.config import DecoderConfig, ResamplerConfig, VisionConfig, XGenMMConfig
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
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_folder(DEMO, MID_SIZE.text.convention, MID_SIZE.additional_ids)
    engine = Engine(XGenMM(MID_SIZE), tokenizer, max_num_seqs=1, cache_bytes=1 << 30)
    rng = random.Random(0)

    def first_token(noise: Image.Image, question: str) -> float:
        sampling = SamplingParams(max_new_tokens=1)
        answer = engine.stream(Request(question, [noise], sampling=sampling))
        answer.text()
        return answer.usage.time_to_first_token

    first: list[float] = []
    second: list[float] = []
    first_token(noise_image(rng, (768, 768)), "Warm?")
    for _ in range(options.requests or 5):
        noise = noise_image(rng, (768, 768))  # 2 x 2 tiles and the whole image
        first.append(first_token(noise, "What is in this image?"))
        second.append(first_token(noise, "How many red shapes are there?"))
    engine.close()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    what = "time to first token, 5 tiles"
    return [
        Row("image", f"{what}: first question", statistics.median(first), "s"),
        Row("image", f"{what}: second question", statistics.median(second), "s"),
        Row("image", "second against first", ratio, "x", at_most=0.2),
    ]
