"""Random models, checkpoints and images: for speed, values do not matter."""

import dataclasses
import io
import json
import lzma
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors.torch import save_file

from xgenmm.config import DecoderConfig, ResamplerConfig, TilingConfig, VisionConfig, XGenMMConfig

if TYPE_CHECKING:
    from xgenmm.models.xgenmm import XGenMM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "weights" / "demo"
RELEASED_TOKENIZER = ROOT / "tests" / "golden" / "tokenizer" / "checkpoint"  # compressed
TINY_CONFIG = XGenMMConfig(
    VisionConfig("siglip", 16, 16, 1, 1, 28, 14),
    ResamplerConfig(4, 1, 1, 16),
    DecoderConfig(704, 32, 48, 2, 2, 1024, initial_vocab=652),
    TilingConfig(grids=((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))),
)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "added_tokens.json")


def random_model(
    config: XGenMMConfig, device: torch.device, dtype: torch.dtype, std: float = 0.02
) -> "XGenMM":
    """A model with random weights, made on the device; equal calls give equal weights."""
    from xgenmm.models.xgenmm import XGenMM  # not installed everywhere: einops

    with torch.device("meta"):
        model = XGenMM(config)
    model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if parameter.ndim > 1:
            values.normal_(0, std)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def write_weights(
    folder: Path,
    config: XGenMMConfig,
    device: torch.device,
    dtype: torch.dtype,
    std: float = 0.02,
) -> None:
    """Write random weights as `model.safetensors`."""
    state = random_model(config, device, dtype, std).state_dict()
    save_file(state, folder / "model.safetensors")


def write_checkpoint(
    folder: Path,
    config: XGenMMConfig,
    device: torch.device,
    dtype: torch.dtype,
    std: float = 0.02,
) -> None:
    """Write a checkpoint folder with random weights and a tokenizer."""
    write_tokenizer(folder, config)
    content = {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "model_type": "xgenmm",
        "vision_encoder_config": dataclasses.asdict(config.vision),
        "vision_tokenizer_config": dataclasses.asdict(config.resampler),
        "text_config": dataclasses.asdict(config.decoder),
    }
    (folder / "config.json").write_text(json.dumps(content))
    preprocessor = {"grids": config.tiling.grids}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_weights(folder, config, device, dtype, std)


def write_tokenizer(folder: Path, config: XGenMMConfig) -> None:
    """Write the files of the tokenizer with the vocabulary of the configuration.

    That is the released one or, for smaller vocabularies, the demo's.
    """
    released = config.decoder.vocab_size == DecoderConfig.vocab_size
    for name in _TOKENIZER_FILES:
        file = (RELEASED_TOKENIZER if released else DEMO) / name
        compressed = file.with_name(f"{name}.xz")
        content = file.read_bytes() if file.exists() else lzma.decompress(compressed.read_bytes())
        (folder / name).write_bytes(content)


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
