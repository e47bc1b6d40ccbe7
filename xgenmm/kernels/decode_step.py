"""One decode step of the whole decoder with the Triton kernels.

The reference is `XGenMM.decode`: the same computation with more launches and more rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import triton
from torch import nn

from xgenmm.config import BLOCK_SIZE
from xgenmm.kernels import triton_attention, triton_linear
from xgenmm.kernels.cuda_graphs import MAX_ROWS
from xgenmm.models.attention import Segment
from xgenmm.models.kv_cache import KVCache, slots
from xgenmm.models.phi3 import DecoderLayer
from xgenmm.models.quantization import QuantizedLinear
from xgenmm.models.xgenmm import XGenMM

FEW_ROWS = 16
"""Up to this batch size reading the weights dominates, and one fused kernel is fastest."""

PROGRAMS = 2048
"""Attention programs of a step: a few for each place on the device, since contexts differ in
length. Batches of up to 32 rows split each head's keys to reach it."""

MAX_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class KernelSegment(Segment):
    """Decoding rows whose attention is the kernel's, which gathers no keys."""

    block_tables: torch.Tensor
    step: "KernelDecodeStep"

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cached: Sequence[torch.Tensor],
        gathered: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """See `Segment.attend`; the new keys and values are read from the cache."""
        keys, values = (tensor.unflatten(0, (-1, BLOCK_SIZE)) for tensor in cached)
        attended = triton_attention.attend(
            query,
            keys,
            values,
            self.positions,
            self.block_tables,
            self.step.config.window_keys,
            self.step.splits(len(query)),
            self.step.arrival_counts,
        )
        return attended.view(query.shape)


class KernelDecodeStep:
    """A `DecodeStep` over a paged cache, with plain or quantized layers."""

    def __init__(self, model: XGenMM, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.config = model.config.decoder
        self.rotary = rotary_tables(
            self.config.max_positions, self.config.head_dim, self.config.rope_theta, model.device
        )
        heads = MAX_ROWS * self.config.num_heads
        self.arrival_counts = torch.zeros(heads, dtype=torch.int32, device=model.device)

    @torch.inference_mode()
    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, block_tables: torch.Tensor
    ) -> torch.Tensor:
        """Run the step.

        Args:
            tokens: int64 [rows], the newest token of each sequence.
            positions: int64 [rows], where they are; -1 is padding, for which nothing is stored.
            block_tables: int32 [rows, max_blocks].

        Returns the logits of the next token, float32 [rows, initial_vocab + additional]; those of
        padding are meaningless.
        """
        decoder = self.model.decoder
        hidden = decoder.embed(tokens)
        for number, layer in enumerate(decoder.model.layers):
            hidden = self._layer(hidden, positions, block_tables, cast(DecoderLayer, layer), number)
        return self._logits(hidden)

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, block_tables: torch.Tensor
    ) -> torch.Tensor:
        """The same in plain PyTorch but for attention, as in a pass with prompts."""
        segment = self.segment(positions, block_tables)
        embeds = self.model.decoder.embed(tokens)
        return self.model.logits(self.model.forward(embeds, [segment], self.cache))

    def segment(self, positions: torch.Tensor, block_tables: torch.Tensor) -> Segment:
        """The newest tokens of decoding rows in a pass with prompts; see `decode_segment`."""
        new_slots = slots(block_tables, positions[:, None])[:, 0]
        return KernelSegment(positions, new_slots, block_tables=block_tables, step=self)

    def splits(self, rows: int) -> int:
        """Programs for each head of each row that fill the device.

        Rows are rounded up to a power of two, since each number of splits is a kernel of its own.
        """
        rows = triton.next_power_of_2(rows)
        return max(1, min(MAX_SPLITS, PROGRAMS // (rows * self.config.num_heads)))

    def _layer(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        block_tables: torch.Tensor,
        layer: DecoderLayer,
        number: int,
    ) -> torch.Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        attended = triton_attention.rotate_store_attend(
            project(hidden, attention.qkv_proj, norm=layer.input_layernorm),
            self.rotary,
            self.cache.keys[number],
            self.cache.values[number],
            positions,
            block_tables,
            self.config.window_keys,
            self.splits(hidden.shape[0]),
            self.arrival_counts,
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
            return self.model.logits(triton_linear.rms_norm(hidden, norm.weight, eps))
        logits = hidden.new_empty(rows, regular + additional.out_features, dtype=torch.float32)
        for weight, bias, out in (
            (head.weight[:regular], head.bias[:regular], logits[:, :regular]),
            (additional.weight, additional.bias, logits[:, regular:]),
        ):
            triton_linear.linear(hidden, weight, norm=norm.weight, eps=eps, bias=bias, out=out)
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
        return triton_linear.linear(
            x, layer.weight, scale=scale, norm=norm_weight, eps=eps, residual=residual, gated=gated
        )
    if norm_weight is not None:
        x = triton_linear.rms_norm(x, norm_weight, eps)
    weight = layer.weight.t()
    y = x @ weight if residual is None else torch.addmm(residual, x, weight)
    return triton_linear.silu_multiply(y) if gated else y


def rotary_tables(
    positions: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position below `positions`, float32 [positions, head_dim / 2] each.

    The formula is that of `phi3.rotary_angles`.
    """
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    angle = torch.arange(positions, device=device)[:, None] / theta ** (pairs / head_dim)
    return angle.cos(), angle.sin()
