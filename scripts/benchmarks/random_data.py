"""Random models, checkpoints and images: for speed, values do not matter."""

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.local_server import ROOT
from xgenmm.checkpoints.registry import read_config
from xgenmm.config import DecoderConfig, ResamplerConfig, TilingConfig, VisionConfig, XGenMMConfig
from xgenmm.models.xgenmm import XGenMM

DEMO = ROOT / "weights" / "demo"
TINY_CONFIG = XGenMMConfig(
    VisionConfig("siglip", 16, 16, 1, 1, 28, 14),
    ResamplerConfig(4, 1, 1, 16),
    DecoderConfig(704, 32, 48, 2, 2, 1024, initial_vocab=652),
    TilingConfig(grids=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))),
)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")


def random_model(config: XGenMMConfig, device: torch.device, dtype: torch.dtype) -> XGenMM:
    """A model with random weights, made on the device; equal calls give equal weights."""
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


def write_weights(
    folder: Path, config: XGenMMConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Write random weights as `model.safetensors`."""
    state = random_model(config, device, dtype).state_dict()
    save_file(state, folder / "model.safetensors")


def write_checkpoint(
    folder: Path, config: XGenMMConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Write a checkpoint folder with random weights and the demo's tokenizer and vocabulary."""
    demo = read_config(DEMO).decoder
    decoder = dataclasses.replace(
        config.decoder, vocab_size=demo.vocab_size, initial_vocab=demo.initial_vocab
    )
    config = dataclasses.replace(config, decoder=decoder)
    for name in _TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder)
    content = {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "vision_encoder_config": dataclasses.asdict(config.vision),
        "vision_tokenizer_config": dataclasses.asdict(config.resampler),
        "text_config": dataclasses.asdict(config.decoder),
    }
    (folder / "config.json").write_text(json.dumps(content))
    preprocessor = {"grids": config.tiling.grids}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_weights(folder, config, device, dtype)


def noise_image(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """An image of random pixels; size is (width, height)."""
    return Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))


def photo_jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG file as large as that of a photograph: smooth colours; size is (width, height)."""
    torch.manual_seed(seed)
    coarse = (torch.rand(12, 16, 3) * 255).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
