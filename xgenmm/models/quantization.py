"""Weight-only quantisation of the decoder's linear layers: int8 or fp8 with one scale a feature.

The embeddings, the output layer and the vision side stay as they are: together they are a seventh
of the model and most of its sensitivity. Activations are not quantised. Weights are quantised one
by one while a checkpoint is read, so a device never holds the whole model in its wider type.
Knows nothing of files.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.errors import InputError

# The largest number of each type: what a feature's largest weight becomes.
QUANTIZATIONS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}

_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_PACKED_ROWS = 16  # a CPU's int8 product is made for few rows, its bfloat16 product for many


class QuantizedLinear(nn.Module):
    """A linear layer without bias: `weight` int8 or float8_e4m3fn [features, width] times `scale`.

    scale: float32 [features].
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., features], the plain way; a GPU's decode step has a kernel.

        On a CPU, int8 weights meet few rows in bfloat16 whatever x is.
        """
        rows = x.numel() // x.shape[-1]
        if x.device.type == "cpu" and self.weight.dtype == torch.int8 and rows <= _PACKED_ROWS:
            narrow = x.reshape(rows, -1).bfloat16()
            packed = torch._weight_int8pack_mm(narrow, self.weight, self.scale.bfloat16())
            return packed.view(*x.shape[:-1], -1).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def check_quantization(kind: str, device: torch.device) -> None:
    """Raise InputError for what is no kind of quantisation, or one that `device` cannot do."""
    if kind not in QUANTIZATIONS:
        raise InputError("quantize", f"{kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    if kind == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            name = torch.cuda.get_device_name(device)
            raise InputError("quantize", f"fp8 needs an H100, L40S or newer; use int8 on {name}")


def quantize_weight(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float weights [features, width] -> the same in `kind` and the scales, float32 [features]."""
    dtype, largest = QUANTIZATIONS[kind]
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=1e-12) / largest
    scaled = wide / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def stored(name: str, values: torch.Tensor, kind: str | None) -> dict[str, torch.Tensor]:
    """What the state dict of a prepared model holds for the checkpoint's tensor `name`."""
    layer, _, last = name.rpartition(".")
    if kind is None or last != "weight" or layer.split(".")[-1] not in _LAYERS:
        return {name: values}
    weight, scale = quantize_weight(values, kind)
    return {name: weight, f"{layer}.scale": scale}


def quantize_linear_layers(decoder: nn.Module, kind: str) -> None:
    """Put a `QuantizedLinear` in the place of each linear layer, with its weights quantised.

    On the meta device that is the empty shell for the state dict that `stored` makes.
    """
    for module in list(decoder.modules()):
        for name in _LAYERS:
            layer = cast(nn.Linear | QuantizedLinear | None, getattr(module, name, None))
            if isinstance(layer, nn.Linear):
                setattr(
                    module, name, QuantizedLinear(*quantize_weight(layer.weight.detach(), kind))
                )


@dataclass(frozen=True)
class Drift:
    """How far logits moved from those of the same model unquantised.

    relative: length of the difference over the length of the exact logits, each row's mean taken
        off, as a constant changes nothing. agreement: share of rows with the same most likely
        token. divergence: mean Kullback-Leibler divergence from the exact distribution, in nats.
    """

    relative: float
    agreement: float
    divergence: float


def drift(exact: torch.Tensor, found: torch.Tensor) -> Drift:
    """Compare logits [..., vocab] of one and the same input."""
    exact, found = exact.double(), found.double()
    centred = exact - exact.mean(-1, keepdim=True)
    difference = found - found.mean(-1, keepdim=True) - centred
    log_exact, log_found = exact.log_softmax(-1), found.log_softmax(-1)
    rows = math.prod(exact.shape[:-1])
    return Drift(
        relative=(difference.norm() / centred.norm()).item(),
        agreement=(exact.argmax(-1) == found.argmax(-1)).double().mean().item(),
        divergence=(log_exact.exp() * (log_exact - log_found)).sum().item() / rows,
    )
