"""One decode step of the whole decoder by the kernels of `kernels.py`.

The readable truth is `XGenMM.decode`; this does the same with few launches and few roundings, on
plain and on quantised layers. Knows nothing of graphs.
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
"""Up to here a layer waits for its weights only, and one fused kernel is the fastest."""

PROGRAMS = 512
"""Programs that fill a device with attention, so a head's keys are shared among several."""


class KernelDecodeStep:
    """One decode step by kernels over the first rows of a cache: a `Step`.

    The same mathematics as `XGenMM.decode`, with fewer roundings. Works with plain and with
    quantised layers.
    """

    def __init__(self, model: XGenMM, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.config = model.config.decoder
        self.rotary = rotary_tables(
            cache.max_length, self.config.head_dim, self.config.rope_theta, model.device
        )
        heads = self.config.num_heads * kernels.LINEAR_ROWS
        self.arrivals = torch.zeros(heads, dtype=torch.int32, device=model.device)

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Step`."""
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
        attended = kernels.attend(
            query, keys, values, positions, config.window_keys, min(16, splits), self.arrivals
        )
        hidden = project(attended, attention.o_proj, residual=hidden)
        inner = project(hidden, mlp.gate_up_proj, norm=layer.post_attention_layernorm, gated=True)
        return project(inner, mlp.down_proj, residual=hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head, norm = self.model.decoder.lm_head, self.model.decoder.model.norm
        eps = self.config.rms_norm_eps
        rows, known, beside = hidden.shape[0], head.initial_vocab, head.additional_fc
        if rows > FEW_ROWS:
            return self.model.logits(kernels.rms_norm(hidden, norm.weight, eps))
        logits = hidden.new_empty(rows, known + beside.out_features, dtype=torch.float32)
        for weight, bias, out in (
            (head.weight[:known], head.bias[:known], logits[:, :known]),
            (beside.weight, beside.bias, logits[:, known:]),
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
    """RMSNorm -> linear layer -> SiLU and multiply -> residual sum, of [rows, width].

    One kernel for few rows and for quantised weights; else the vendor's matrix product, which can
    add the residual itself, with a kernel before or behind it.
    """
    eps = norm.eps or 0.0 if norm is not None else 0.0
    gain = None if norm is None else norm.weight
    if isinstance(layer, QuantizedLinear) or x.shape[0] <= FEW_ROWS:
        scale = layer.scale if isinstance(layer, QuantizedLinear) else None
        return kernels.linear(
            x, layer.weight, scale=scale, norm=gain, eps=eps, residual=residual, gated=gated
        )
    if gain is not None:
        x = kernels.rms_norm(x, gain, eps)
    weight = layer.weight.t()
    y = x @ weight if residual is None else torch.addmm(residual, x, weight)
    return kernels.silu_multiply(y) if gated else y


def rotary_tables(
    positions: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position, float32 [positions, head_dim / 2]."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angle = torch.arange(positions, device=device)[:, None] / theta ** (pairs / head_dim)
    return angle.cos(), angle.sin()
