"""One decode step of the whole decoder with the kernels of `triton_ops.py`.

The reference is `XGenMM.decode`: the same computation with more launches and more rounding.
"""

from typing import cast

import torch
from torch import nn

from xgenmm.kernels import triton_ops as kernels
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import DecoderLayer
from xgenmm.models.quantization import QuantizedLinear
from xgenmm.models.xgenmm import XGenMM

FEW_ROWS = 16
"""Up to this batch size reading the weights dominates, and one fused kernel is fastest."""

PROGRAMS = 512
"""Attention programs that fill the device; small batches split each head's keys to reach it."""


class KernelDecodeStep:
    """A `DecodeStep` over the first rows of a cache, for plain and quantized layers."""

    def __init__(self, model: XGenMM, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.config = model.config.decoder
        self.rotary = rotary_tables(
            cache.max_length, self.config.head_dim, self.config.rope_theta, model.device
        )
        heads = self.config.num_heads * kernels.LINEAR_ROWS
        self.arrival_counts = torch.zeros(heads, dtype=torch.int32, device=model.device)

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens and positions int64 [n] -> logits float32 [n, vocab]; see `DecodeStep`."""
        decoder = self.model.decoder
        hidden = decoder.embed(tokens)
        for number, layer in enumerate(decoder.model.layers):
            hidden = self._layer(hidden, positions, cast(DecoderLayer, layer), number)
        return self._logits(hidden)

    def _layer(
        self, hidden: torch.Tensor, positions: torch.Tensor, layer: DecoderLayer, number: int
    ) -> torch.Tensor:
        config, rows = self.config, hidden.shape[0]
        keys, values = self.cache.keys[number], self.cache.values[number]
        attention, mlp = layer.self_attn, layer.mlp
        splits = max(1, PROGRAMS // (rows * config.num_heads))
        qkv = project(hidden, attention.qkv_proj, norm=layer.input_layernorm)
        query = kernels.rotate_and_store(qkv, positions, self.rotary, keys, values)
        window, splits = config.window_keys, min(16, splits)
        attended = kernels.attend(
            query, keys, values, positions, window, splits, self.arrival_counts
        )
        hidden = project(attended, attention.o_proj, residual=hidden)
        norm = layer.post_attention_layernorm
        activated = project(hidden, mlp.gate_up_proj, norm=norm, gated=True)
        return project(activated, mlp.down_proj, residual=hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head, norm = self.model.decoder.lm_head, self.model.decoder.model.norm
        eps = self.config.rms_norm_eps
        rows, regular, additional = hidden.shape[0], head.initial_vocab, head.additional_fc
        if rows > FEW_ROWS:
            return self.model.logits(kernels.rms_norm(hidden, norm.weight, eps))
        logits = hidden.new_empty(rows, regular + additional.out_features, dtype=torch.float32)
        for weight, bias, out in (
            (head.weight[:regular], head.bias[:regular], logits[:, :regular]),
            (additional.weight, additional.bias, logits[:, regular:]),
        ):
            kernels.linear(hidden, weight, norm=norm.weight, eps=eps, bias=bias, out=out)
        return logits


def project(
    x: torch.Tensor,
    layer: nn.Linear | QuantizedLinear,
    *,
    norm: nn.RMSNorm | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Optional RMSNorm, linear layer, optional SiLU gating, optional residual sum.

    One fused kernel for few rows and for quantized weights; otherwise cuBLAS, which can add the
    residual itself, with separate kernels for norm and gating.

    Args:
        x: [rows, width].
        norm: applied to x first.
        residual: [rows, features], added to the result.
        gated: `layer` computes gate and up; the result is silu(gate) * up, of half as many
            features.

    Returns [rows, features].
    """
    eps = norm.eps or 0.0 if norm is not None else 0.0
    norm_weight = None if norm is None else norm.weight
    if isinstance(layer, QuantizedLinear) or x.shape[0] <= FEW_ROWS:
        scale = layer.scale if isinstance(layer, QuantizedLinear) else None
        return kernels.linear(
            x, layer.weight, scale=scale, norm=norm_weight, eps=eps, residual=residual, gated=gated
        )
    if norm_weight is not None:
        x = kernels.rms_norm(x, norm_weight, eps)
    weight = layer.weight.t()
    y = x @ weight if residual is None else torch.addmm(residual, x, weight)
    return kernels.silu_multiply(y) if gated else y


def rotary_tables(
    positions: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position below `positions`, float32 [positions, head_dim / 2] each.

    The formula is that of `phi3.rotary_angles`.
    """
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angle = torch.arange(positions, device=device)[:, None] / theta ** (pairs / head_dim)
    return angle.cos(), angle.sin()
