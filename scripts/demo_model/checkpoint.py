"""The demo's checkpoint folder: sizes, configuration files, tokenizer and weights."""

import json
import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from scripts.demo_model.wordings import vocabulary
from xgenmm.checkpoints.manifest import write_manifest
from xgenmm.config import DecoderConfig, ResamplerConfig, TilingConfig, VisionConfig, XGenMMConfig
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import DEFAULT_SYSTEM_PROMPT
from xgenmm.preprocessing.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEMO = Path(__file__).resolve().parents[2] / "weights" / "demo"

VOCAB_SIZE = 640  # of the SentencePiece model, 256 bytes included
TILE, SIDE = 96, 12  # a tile in pixels and in patches
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
    "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>",
    "<|user|>", "<pad>",
)  # fmt: skip
CONFIG = XGenMMConfig(
    frames_as_images=True,  # as for its base
    vision=VisionConfig("siglip", 192, 768, 4, 3, TILE, TILE // SIDE),
    resampler=ResamplerConfig(num_latents=36, depth=2, num_heads=6, head_dim=32),
    decoder=DecoderConfig(
        vocab_size=704,
        hidden_size=192,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        initial_vocab=VOCAB_SIZE + len(SPECIAL_TOKENS),
    ),
    tiling=TilingConfig(
        grids=tuple((c * TILE, r * TILE) for c, r in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    ),
    demo=True,
)
_SPECIAL_IDS = {token: VOCAB_SIZE + i for i, token in enumerate(SPECIAL_TOKENS)}


def write_folder(folder: Path) -> None:
    """Write everything of the checkpoint but its weights: configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {
        "config.json": model_config(CONFIG),
        "preprocessor_config.json": {
            "image_processor_type": "Blip3ImageProcessor",
            "do_resize": True,
            "resize_mode": "squash",
            "interpolation_mode": "bicubic",
            "size": [TILE, TILE],
            "grids": [list(grid) for grid in CONFIG.tiling.grids],
            "image_mean": list(CONFIG.tiling.mean),
            "image_std": list(CONFIG.tiling.std),
        },
        "tokenizer_config.json": _tokenizer_config(),
        "added_tokens.json": _SPECIAL_IDS,
        "special_tokens_map.json": {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
        },
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": _SPECIAL_IDS["<|end|>"],
            "pad_token_id": _SPECIAL_IDS["<pad>"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_train_tokenizer())


def model_config(config: XGenMMConfig) -> dict[str, Any]:
    """The content of config.json, in the layout of the released checkpoints."""
    vision, resampler, decoder = config.vision, config.resampler, config.decoder
    temporal = {}
    if config.temporal is not None:
        sizes = ("memory_size", "num_layers", "num_heads")
        temporal["temporal_encoder_config"] = {
            name: getattr(config.temporal, name) for name in ("kind", *sizes)
        }
    return {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "model_type": "xgenmm",
        "demo": True,
        "torch_dtype": "bfloat16",
        "vision_encoder_config": {
            "model_type": "xgenmm_vision_encoder",
            "image_aspect_ratio": config.tiling.mode,
            "anyres_patch_sampling": config.tiling.mode == "anyres",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "vision_tokenizer_config": {
            "model_type": "xgenmm_vision_tokenizer",
            "num_latents": resampler.num_latents,
            "depth": resampler.depth,
            "num_heads": resampler.num_heads,
            "head_dim": resampler.head_dim,
        },
        **temporal,
        "text_config": {
            "model_type": "phi3",
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.hidden_size,
            "intermediate_size": decoder.intermediate_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "max_position_embeddings": decoder.max_positions,
            "sliding_window": decoder.sliding_window,
            "initial_tokenizer_len": decoder.initial_vocab,
            "torch_dtype": "bfloat16",
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    entries = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": token.startswith("<|") and token != "<|endoftext|>",
            "single_word": False,
            "special": True,
        }
        for token, number in {"<unk>": 0, "<s>": 1, "</s>": 2, **_SPECIAL_IDS}.items()
    }
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": entries,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "model_max_length": CONFIG.decoder.max_positions,
        "padding_side": "left",
    }


def _train_tokenizer() -> bytes:
    """Train the SentencePiece model on the world's texts; returns the content of its file."""
    model = BytesIO()
    lines = [*vocabulary(), *[DEFAULT_SYSTEM_PROMPT] * 20]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        required_chars="".join(map(chr, range(33, 127))),
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def demo_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in the folder that `write_folder` made."""
    return Tokenizer.from_folder(folder, CONFIG.text.convention, CONFIG.additional_ids)


def write_weights(model: XGenMM, folder: Path) -> None:
    """Write the model's tensors in bfloat16, atomically, and the folder's manifest."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    (folder / "model.tmp").chmod(0o644)
    (folder / "model.tmp").replace(folder / "model.safetensors")
    write_manifest(folder, name=folder.name)
    logger.info("wrote %s", folder / "model.safetensors")
