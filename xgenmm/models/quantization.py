"""Weight-only quantization of the decoder's linear layers to int8 or fp8.

Each output feature has its own scale; activations are not quantized. Embeddings, output layer,
vision tower and resampler keep their precision: they are a sixth of the weights and the most
sensitive ones. Weights are quantized one tensor at a time as a checkpoint is read, so the device
never holds the whole model at full precision.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from xgenmm.errors import InputError

# Dtype, and the value that the largest weight of each feature is scaled to.
QUANTIZATIONS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}

_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_MAX_PACKED_ROWS = 16  # above, a CPU is faster with dequantized weights than with its int8 product


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is `weight * scale[:, None]`.

    weight: int8 or float8_e4m3fn [features, width]. scale: float32 [features].
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., features]; decode steps on a GPU use a fused kernel instead.

        On a CPU, int8 products of few rows are computed in bfloat16 whatever the dtype of `x`.
        """
        rows = x.numel() // x.shape[-1]
        if x.device.type == "cpu" and self.weight.dtype == torch.int8 and rows <= _MAX_PACKED_ROWS:
            flat = x.reshape(rows, -1).bfloat16()
            product = torch._weight_int8pack_mm(flat, self.weight, self.scale.bfloat16())
            return product.view(*x.shape[:-1], -1).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def check_quantization(kind: str, device: torch.device) -> None:
    """Raise InputError if `kind` is not in `QUANTIZATIONS` or `device` does not support it."""
    if kind not in QUANTIZATIONS:
        raise InputError("quantize", f"{kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    if kind == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            name = torch.cuda.get_device_name(device)
            raise InputError(
                "quantize", f"fp8 needs an H100, an L40S or a newer GPU; use int8 on {name}"
            )


def quantize_weight(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a float weight [features, width]; return it and its scales, float32 [features]."""
    dtype, largest = QUANTIZATIONS[kind]
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / largest
    scaled = weight / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantized_state(name: str, tensor: torch.Tensor, kind: str | None) -> dict[str, torch.Tensor]:
    """Return the state-dict entries of a quantized model for the checkpoint's tensor `name`.

    Tensors that are not quantized, and all tensors if `kind` is None, are returned as they are.
    """
    layer, _, parameter = name.rpartition(".")
    if kind is None or parameter != "weight" or layer.split(".")[-1] not in _LAYERS:
        return {name: tensor}
    weight, scale = quantize_weight(tensor, kind)
    return {name: weight, f"{layer}.scale": scale}


def quantize_linear_layers(decoder: nn.Module, kind: str) -> None:
    """Replace each linear layer of the decoder by a `QuantizedLinear` with its quantized weights.

    On the meta device this gives the module that a state dict of `quantized_state` entries fits.
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
    """How far the logits of a quantized model are from those of the original.

    Attributes:
        relative: norm of the difference over the norm of the original logits, with each row's mean
            subtracted first, since a constant offset changes no probability.
        agreement: share of rows with the same most likely token.
        divergence: mean Kullback-Leibler divergence from the original distribution, in nats.
    """

    relative: float
    agreement: float
    divergence: float


def drift(exact: torch.Tensor, found: torch.Tensor) -> Drift:
    """Compare original logits with those of the quantized model, [..., vocab], for one input."""
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
