"""What is trained: LoRA and the resampler, or everything but the vision tower; adapter folders.

An adapter folder is in peft's format: `adapter_config.json`, and `adapter_model.safetensors` with
the LoRA matrices and, if it was trained whole, the resampler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from xgenmm.checkpoints.adapter import BASE_FINGERPRINT, PREFIX, fingerprint
from xgenmm.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from xgenmm.checkpoints.staging import disk_full
from xgenmm.errors import CheckpointError, InputError
from xgenmm.files import sync, write_json
from xgenmm.finetuning.module import TrainedModel, freeze_vision
from xgenmm.models.xgenmm import XGenMM

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""All linear layers of Phi-3; others have q_proj, gate_proj and so on, which match nothing here."""

_DECODER, _RESAMPLER = "vlm.lang_model.model.layers.", "vlm.vision_tokenizer."


@dataclass(frozen=True)
class TrainingTarget:
    """Which parameters are trained.

    Attributes:
        full: everything but the vision tower, as the authors do; the rest is then ignored.
        rank, alpha: of LoRA; the product of its matrices is scaled by alpha / rank.
        targets: names of the decoder's layers that get it.
        resampler: trained `whole`, with `lora`, or `frozen`.
    """

    full: bool = False
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    resampler: Literal["whole", "lora", "frozen"] = "whole"


def select_parameters(model: XGenMM, target: TrainingTarget) -> dict[str, Any] | None:
    """Make the parameters trainable that `target` names, and all others not.

    LoRA matrices are drawn from torch's global generator. Returns the content of peft's
    configuration file, None for full training.

    Raises InputError if a target matches no layer, or peft is not installed.
    """
    if target.full:
        freeze_vision(model)
        return None
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("lora", "needs peft; run `pip install 'xgenmm[finetune]'`") from error
    modules = _lora_modules(model, target)
    config = LoraConfig(r=target.rank, lora_alpha=target.alpha, target_modules=modules)
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    if target.resampler == "whole":
        model.vlm.vision_tokenizer.requires_grad_(True)
        config.modules_to_save = ["vision_tokenizer"]
    for parameter in model.parameters():
        if parameter.requires_grad:  # AdamW's small steps vanish in bfloat16
            parameter.data = parameter.data.float()
    content: dict[str, Any] = config.to_dict()
    return {
        **{key: sorted(v) if isinstance(v, set) else v for key, v in content.items()},
        "peft_type": "LORA",
        "inference_mode": True,
    }


def _lora_modules(model: XGenMM, target: TrainingTarget) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    modules = []
    for name in target.targets:
        found = [full for full in linear if full.startswith(_DECODER) and full.endswith(f".{name}")]
        if not found:
            existing = ", ".join(LORA_TARGETS)
            raise InputError("lora-targets", f"no layer is named {name}; use some of {existing}")
        modules += found
    if target.resampler == "lora":
        modules += [name for name in linear if name.startswith(_RESAMPLER)]
    return modules


def trained_tensors(module: TrainedModel) -> dict[str, torch.Tensor]:
    """Return the trained parameters on the CPU under the names that peft's files have."""
    return {
        name.replace(".default.", "."): parameter.detach().cpu().contiguous()
        for name, parameter in module.trained_parameters()
    }


def save_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], base: Path
) -> None:
    """Write an adapter into an existing folder. base: folder of the checkpoint it belongs to.

    Raises CheckpointError if the disk is full.
    """
    write_json(folder / CONFIG_FILE, {**config, "base_model_name_or_path": base.name})
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS_FILE, named, {BASE_FINGERPRINT: fingerprint(base)})


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file and flush it. Raises CheckpointError if the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # it has no errno; in practice the disk is full
        raise CheckpointError(disk_full(path, str(error))) from error
    sync(path)


def count_parameters(parameters: Sequence[torch.Tensor]) -> int:
    """Return how many numbers tensors hold."""
    return sum(parameter.numel() for parameter in parameters)
