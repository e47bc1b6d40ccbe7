"""From the bytes of images to vision tokens."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.gpu.context import Context
from scripts.benchmarks.gpu.figures import Figure
from xgenmm.models.vision import SiglipTower, fuse_attention
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.tiling import tile_image


@torch.inference_mode()
def vision(context: Context) -> Iterator[Figure]:
    """Measure decoding and tiling on the host, and tower and resampler on the device."""
    size, device, model = context.size, context.device, context.model
    config = model.config
    side, file = config.vision.image_size, context.image(0)
    image = read_image(file)
    seconds = device.seconds(lambda: read_image(file), size.rounds)
    yield Figure("decode a JPEG file", 1e3 * seconds, "ms")
    seconds = device.seconds(lambda: tile_image(image, config.tiling, side), size.rounds)
    yield Figure("cut it into tiles", 1e3 * seconds, "ms")
    tiles = tile_image(image, config.tiling, side)
    one = tile_image(image, replace(config.tiling, mode="squash"), side)
    for name, images in (("1 tile", [one]), ("5 tiles", [tiles]), ("20 tiles", [tiles] * 4)):
        with FlopCounterMode(display=False) as counter:
            model.encode(images)
        seconds = device.seconds(partial(model.encode, images), size.rounds)
        rate = counter.get_total_flops() / seconds
        what = f"tower and resampler, {name}: of a matrix product"
        share = 100 * rate / context.matmul_rate
        yield Figure(what, share, "%", {"ms": 1e3 * seconds, "TFLOP/s": rate / 1e12})
    pixels = torch.randn(5, 3, side, side, device=device.device).to(device.dtype)
    with device.device:
        tower: nn.Module = SiglipTower(config.vision)
    tower.to(device.dtype)
    seconds = device.seconds(lambda: tower(pixels), size.rounds)
    fuse_attention(tower)
    fused = device.seconds(lambda: tower(pixels), size.rounds)
    details = {"ms with three products": 1e3 * seconds}
    yield Figure("tower, 5 tiles, one product for q, k and v", 1e3 * fused, "ms", details)
