"""Adapters with random weights, as `xgenmm finetune` and peft write them."""

import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xgenmm.checkpoints.adapter import BASE_FINGERPRINT, PREFIX, fingerprint
from xgenmm.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from xgenmm.checkpoints.loading import stored_tensors

RANK = 4
LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
RESAMPLER = "vlm.vision_tokenizer.latents"


def tensors(base: Path, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """LoRA for all linear layers of the decoder, and the resampler's latents, for a checkpoint."""
    torch.manual_seed(7)
    made = {}
    for name, stored in stored_tensors(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(LAYERS):
            features, width = stored.shape
            made[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(RANK, width) * scale
            made[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(features, RANK) * scale
        elif name == RESAMPLER:
            made[PREFIX + name] = torch.randn(stored.shape)
    return made


def write(
    folder: Path,
    base: Path,
    content: dict[str, torch.Tensor] | None = None,
    *,
    fingerprinted: bool = True,
    **config: Any,
) -> Path:
    """Write an adapter of a checkpoint, and return its folder.

    content: by default that of `tensors`. config: fields of peft's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.name,
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": list(LAYERS),
        **config,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    metadata = {BASE_FINGERPRINT: fingerprint(base)} if fingerprinted else {}
    content = tensors(base) if content is None else content
    save_file(content, folder / WEIGHTS_FILE, {"format": "pt", **metadata})
    return folder


def pack(path: Path, adapter: Path, prefix: str = "", mode: str = "w") -> Path:
    """Pack a folder's files into a tar, each as PREFIXname, and return the tar."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for file in sorted(adapter.iterdir()):
            tar.add(file, f"{prefix}{file.name}")
    return path
