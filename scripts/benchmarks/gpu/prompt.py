"""From the bytes of images to the first token, and the vision tower's share of it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.random_data import photo_jpeg
from scripts.benchmarks.report import Row
from xgenmm import read_image
from xgenmm.config import TilingConfig
from xgenmm.kernels.cuda_graphs import build_decode_step
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import tile_image

GOALS = {"1 large image, 5 tiles": 40.0, "second question on the same image": 10.0}  # ms
TILES = 5  # of a large image


def embed(
    model: XGenMM, files: Sequence[bytes], text: int, tiling: TilingConfig | None = None
) -> torch.Tensor:
    """Embeddings [positions, width] of encoded images followed by a question of `text` ids."""
    side = model.config.vision.image_size
    images = [tile_image(read_image(file), tiling or model.config.tiling, side) for file in files]
    ids = tuple(range(len(files) + text))
    prompt = Prompt(ids, tuple((number, 1) for number in range(len(files))))
    return model.merge_multimodal_embeddings(prompt, model.encode(images, prompt))


def first_tokens(device: Device, model: XGenMM, size: Size) -> tuple[float, list[Row]]:
    """Measure first tokens; returns the seconds of a one-word answer, and the rows."""
    config = model.config
    latents = config.resampler.num_latents
    cache = model.cache(1, 4 * TILES * latents + 2 * size.text + 8)
    step = build_decode_step(model, cache)
    images = [photo_jpeg(size.image, seed) for seed in range(4)]

    def first(files: Sequence[bytes], tiling: TilingConfig | None = None) -> torch.Tensor:
        return model.prefill([embed(model, files, size.text, tiling)], cache).argmax(-1)

    def one_word() -> None:
        token = first(images[:1])
        length = TILES * latents + size.text
        int(token)
        int(step(token, torch.full_like(token, length), cache, length + 1).argmax(-1))

    def second_question() -> None:
        ids = model.embed_ids(list(range(size.text)))
        int(model.prefill_chunk([ids], [TILES * latents], None, cache).argmax(-1))

    squash = replace(config.tiling, mode="squash")
    work = {
        "1 tile": lambda: int(first(images[:1], squash)),
        "1 large image, 5 tiles": lambda: int(first(images[:1])),
        "4 large images, 20 tiles": lambda: int(first(images)),
        "second question on the same image": second_question,
    }
    with torch.inference_mode():
        word_seconds = device.seconds(one_word, size.rounds)
        seconds = {name: device.seconds(call, size.rounds) for name, call in work.items()}
    rows = [
        Row("first token", f"{name}, from JPEG bytes", 1e3 * value, "ms", at_most=GOALS.get(name))
        for name, value in seconds.items()
    ]
    rows.append(Row("answer", "one word, from JPEG bytes", 1e3 * word_seconds, "ms", at_most=50.0))
    return word_seconds, rows


def vision(device: Device, model: XGenMM, size: Size, matmul_rate: float) -> list[Row]:
    """Tower and resampler against the rate of a matrix product (FLOP/s)."""
    file = photo_jpeg(size.image, 0)
    image = tile_image(read_image(file), model.config.tiling, model.config.vision.image_size)

    def encode() -> None:
        model.encode([image])

    with FlopCounterMode(display=False) as counter:
        encode()
    seconds = device.seconds(encode, size.rounds)
    rate = counter.get_total_flops() / seconds
    return [
        Row("vision", "tower and resampler, 5 tiles", 1e3 * seconds, "ms"),
        Row("vision", "of the matrix product's rate", 100 * rate / matmul_rate, "%", at_least=50.0),
    ]
