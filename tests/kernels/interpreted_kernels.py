"""The kernels in Triton's interpreter against plain PyTorch; `test_triton_ops.py` runs this file.

It runs in a process of its own, since the interpreter must be enabled before the kernels are
imported. The interpreter's bfloat16 matrix products are wrong (it multiplies the raw bits), so
several rows are tested in float16 and float32.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.test_triton_ops import TINY
from xgenmm.config import DecoderConfig, ResamplerConfig, VisionConfig, XGenMMConfig
from xgenmm.kernels import decode_step
from xgenmm.kernels import triton_ops as kernels
from xgenmm.kernels.cuda_graphs import CudaGraphRunner
from xgenmm.kernels.decode_step import KernelDecodeStep, rotary_tables
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.phi3 import rotary_angles
from xgenmm.models.quantization import QUANTIZATIONS, quantize_linear_layers, quantize_weight
from xgenmm.models.xgenmm import XGenMM

CPU = torch.device("cpu")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("rows", "dtype", "tolerance"),
    [
        (1, torch.float32, 1e-6),
        (1, torch.bfloat16, 5e-3),
        (3, torch.float32, 1e-6),
        (17, torch.float16, 2e-3),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_linear_with_all_fused_operations_equals_pytorch(
    rows: int, dtype: torch.dtype, tolerance: float, gated: bool
) -> None:
    torch.manual_seed(0)
    width, features = 200, 37  # multiples of no block size
    x, norm = torch.randn(rows, width).to(dtype), (1 + torch.rand(width)).to(dtype)
    weight = torch.randn(features * (1 + gated), width).to(dtype)
    residual = torch.randn(rows, features).to(dtype)
    bias = None if gated else torch.randn(features).to(dtype)
    wide = F.rms_norm(x.float(), (width,), norm.float(), 1e-5)
    expected = F.linear(wide, weight.float(), None if bias is None else bias.float())
    if gated:
        expected = F.silu(expected[:, :features]) * expected[:, features:]
    found = kernels.linear(
        x, weight, norm=norm, eps=1e-5, bias=bias, residual=residual, gated=gated
    )
    assert found.dtype == dtype
    assert relative(found, expected + residual.float()) < tolerance


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_linear_with_quantised_weights_equals_pytorch(kind: str, rows: int, gated: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(rows, 64)
    weight, scale = quantize_weight(torch.randn(40, 64), kind)
    expected = F.linear(x, weight.float() * scale[:, None])
    if gated:
        expected = F.silu(expected[:, :20]) * expected[:, 20:]
    assert relative(kernels.linear(x, weight, scale=scale, gated=gated), expected) < 1e-6


def test_linear_writes_to_a_slice_of_a_wider_tensor() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 32), torch.randn(5, 32)
    out = torch.zeros(2, 9)
    kernels.linear(x, weight, out=out[:, 3:8])
    torch.testing.assert_close(out, F.pad(F.linear(x, weight), (3, 1)))


@pytest.mark.parametrize("head_dim", [96, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_and_cache_write_equal_pytorch(head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    heads, max_length, tolerance = 2, 70, {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    positions = torch.tensor([0, 69, -1])
    qkv = torch.randn(3, 3 * heads * head_dim).to(dtype)
    keys, values = torch.randn(2, 4, heads, max_length, head_dim).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    query = kernels.rotate_and_store(
        qkv, positions, rotary_tables(max_length, head_dim, 1e4, CPU), keys, values
    )
    parts = qkv.float().view(3, 3, heads, head_dim)
    angles = rotary_angles(positions[:, None].clamp(min=0), head_dim, 1e4, torch.float32)
    cosine, sine = (angle[:, 0] for angle in angles)
    first, second = parts[:, :2].chunk(2, dim=-1)
    rotated = parts[:, :2] * cosine + torch.cat([-second, first], dim=-1) * sine
    for row in (0, 1):  # the last row is padding
        expected_keys[row, :, positions[row]] = rotated[row, 1].to(dtype)
        expected_values[row, :, positions[row]] = parts[row, 2].to(dtype)
    torch.testing.assert_close(query.float(), rotated[:, 0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(keys, expected_keys, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("window", [20, 100])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "tolerance"), [(96, torch.float32, 1e-5), (32, torch.bfloat16, 1e-2)]
)
def test_attention_over_the_window_equals_pytorch(
    splits: int, window: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(4)
    heads, max_length = 2, 70
    positions = torch.tensor([0, 69, -1, 33])
    query = torch.randn(4, heads, head_dim).to(dtype)
    keys, values = torch.randn(2, 5, heads, max_length, head_dim).to(dtype)
    arrival_counts = torch.zeros(4 * heads, dtype=torch.int32)
    for _ in range(2):  # the second call relies on the counts that the first one reset
        found = kernels.attend(query, keys, values, positions, window, splits, arrival_counts)
    for row in (0, 1, 3):
        end = int(positions[row]) + 1
        visible = slice(max(0, end - window), end)
        row_keys, row_values = keys[row, :, visible].float(), values[row, :, visible].float()
        expected = F.scaled_dot_product_attention(
            query[row, :, None].float(), row_keys, row_values
        ).flatten()
        torch.testing.assert_close(found[row].float(), expected, rtol=0, atol=tolerance)
    assert found[2].count_nonzero() == 0
    assert arrival_counts.count_nonzero() == 0


def test_rms_norm_and_silu_multiply_equal_pytorch() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(3, 42), torch.rand(42)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x, (42,), weight, 1e-5)
    )
    torch.testing.assert_close(kernels.silu_multiply(x), F.silu(x[:, :21]) * x[:, 21:])


def tiny_model(kind: str | None = None) -> XGenMM:
    torch.manual_seed(6)
    vision, resampler = VisionConfig("siglip", 16, 16, 1, 1, 28, 14), ResamplerConfig(2, 1, 1, 8)
    model = XGenMM(XGenMMConfig(vision, resampler, decoder=TINY)).eval().requires_grad_(False)
    if kind is not None:
        quantize_linear_layers(model.decoder, kind)
    return model


def prompts_and_tokens(config: DecoderConfig, rows: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embedded prompts of different lengths, and two tokens to decode for each row."""
    torch.manual_seed(7)
    prompts = [torch.randn(3 + 5 * (row % 5), config.hidden_size) for row in range(rows)]
    tokens = torch.randint(0, config.initial_vocab + config.additional_tokens, (2, rows))
    return prompts, tokens


@pytest.mark.parametrize(
    ("rows", "kind", "few"), [(1, None, 16), (1, "fp8", 16), (3, None, 16), (3, None, 2)]
)
def test_decode_step_with_kernels_and_buckets_equals_the_plain_step(
    rows: int, kind: str | None, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "FEW_ROWS", few)  # larger batches use cuBLAS
    monkeypatch.setattr(decode_step, "PROGRAMS", 8)
    model = tiny_model(kind)
    prompts, tokens = prompts_and_tokens(TINY, rows)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    max_length = int(lengths.max()) + 2
    plain_cache, kernel_cache = (
        KVCache.allocate(TINY, rows, max_length, device=CPU, dtype=torch.float32) for _ in range(2)
    )
    for cache in (plain_cache, kernel_cache):
        model.prefill(prompts, cache)
    runner = CudaGraphRunner(
        KernelDecodeStep(model, kernel_cache), rows, CPU, capture=lambda function: function
    )
    for step, new in enumerate(tokens):
        expected = model.decode(new, lengths + step, plain_cache)
        found = runner.decode(new, lengths + step)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        kernel_cache.keys[:, 0, :, : lengths[0] + 2], plain_cache.keys[:, 0, :, : lengths[0] + 2]
    )
