"""The kernels in Triton's interpreter against plain PyTorch; run by `test_triton_kernels.py`.

It runs in a process of its own, since the interpreter must be enabled before the kernels are
imported. The interpreter's bfloat16 matrix products are wrong (it multiplies the raw bits), so
several rows are tested in float16 and float32.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.test_triton_kernels import TINY
from xgenmm.config import BLOCK_SIZE, DecoderConfig, ResamplerConfig, VisionConfig, XGenMMConfig
from xgenmm.kernels import decode_step
from xgenmm.kernels.cuda_graphs import CudaGraphRunner
from xgenmm.kernels.decode_step import KernelDecodeStep, rotary_tables
from xgenmm.kernels.triton_attention import attend, rotate_store_attend
from xgenmm.kernels.triton_linear import linear, rms_norm, silu_multiply
from xgenmm.models.attention import decode_segment, prompt_segment
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
        (70, torch.float32, 1e-6),  # more than one program computes
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
    found = linear(x, weight, norm=norm, eps=1e-5, bias=bias, residual=residual, gated=gated)
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
    assert relative(linear(x, weight, scale=scale, gated=gated), expected) < 1e-6


def test_linear_writes_to_a_slice_of_a_wider_tensor() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 32), torch.randn(5, 32)
    out = torch.zeros(2, 9)
    linear(x, weight, out=out[:, 3:8])
    torch.testing.assert_close(out, F.pad(F.linear(x, weight), (3, 1)))


MAX_BLOCKS = 3
POSITIONS = torch.tensor([64, 69, -1, 33, 0])  # the third row is padding


def noisy_cache(config: DecoderConfig, dtype: torch.dtype) -> tuple[KVCache, torch.Tensor]:
    """A cache full of noise, and block tables for `POSITIONS`; the first two rows share a block."""
    cache = KVCache.allocate(config, 4 * MAX_BLOCKS * len(POSITIONS), device=CPU, dtype=dtype)
    cache.keys.normal_()
    cache.values.normal_()
    blocks = 1 + torch.randperm(cache.num_blocks - 1)[: MAX_BLOCKS * len(POSITIONS)]
    block_tables = blocks.view(-1, MAX_BLOCKS).int()
    block_tables[1, 0] = block_tables[0, 0]
    return cache, block_tables


def reference_attention(
    query: torch.Tensor, cache: KVCache, block_tables: torch.Tensor, window: int
) -> torch.Tensor:
    """Attention over the first layer: [rows, heads, head_dim] -> [rows, heads * head_dim]."""
    out = torch.zeros_like(query)
    for row, position in enumerate(POSITIONS.tolist()):
        visible = slice(max(0, position + 1 - window), position + 1)
        keys, values = (
            blocks[0, block_tables[row].long()].flatten(0, 1)[visible].transpose(0, 1).float()
            for blocks in (cache.keys, cache.values)
        )
        if position >= 0:
            out[row] = F.scaled_dot_product_attention(query[row, :, None], keys, values)[:, 0]
    return out.flatten(1)


over_a_paged_cache = pytest.mark.parametrize(
    ("head_dim", "dtype", "tolerance"), [(96, torch.float32, 1e-5), (32, torch.bfloat16, 2e-2)]
)
"""The third value is the largest absolute error."""


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("window", [20, 100])
@over_a_paged_cache
def test_attention_over_the_window_equals_pytorch(
    splits: int, window: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(4)
    config = DecoderConfig(hidden_size=2 * head_dim, num_heads=2, num_layers=1)
    cache, block_tables = noisy_cache(config, dtype)
    query = torch.randn(len(POSITIONS), 2, head_dim).to(dtype)
    expected = reference_attention(query.float(), cache, block_tables, window)
    counts = torch.zeros(len(POSITIONS) * 2, dtype=torch.int32)
    for _ in range(2):  # the second call relies on the counts that the first one reset
        found = attend(
            query, cache.keys[0], cache.values[0], POSITIONS, block_tables, window, splits, counts
        )
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)
    assert counts.count_nonzero() == 0


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("window", [20, 100])
@over_a_paged_cache
def test_rotation_cache_write_and_attention_equal_pytorch(
    splits: int, window: int, head_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(3)
    config = DecoderConfig(hidden_size=2 * head_dim, num_heads=2, num_layers=1)
    cache, block_tables = noisy_cache(config, dtype)
    qkv = torch.randn(len(POSITIONS), 3 * 2 * head_dim).to(dtype)
    parts = qkv.float().view(-1, 3, 2, head_dim)
    cosine, sine = rotary_angles(POSITIONS.clamp(min=0), head_dim, 1e4, torch.float32)
    first, second = parts[:, :2].chunk(2, dim=-1)
    rotated = parts[:, :2] * cosine + torch.cat([-second, first], dim=-1) * sine
    expected = KVCache(cache.keys.clone(), cache.values.clone())
    for row, position in enumerate(POSITIONS.tolist()):
        if position >= 0:
            block = block_tables[row, position // BLOCK_SIZE]
            expected.keys[0, block, position % BLOCK_SIZE] = rotated[row, 1].to(dtype)
            expected.values[0, block, position % BLOCK_SIZE] = parts[row, 2].to(dtype)
    found = rotate_store_attend(
        qkv,
        rotary_tables(MAX_BLOCKS * BLOCK_SIZE, head_dim, 1e4, CPU),
        cache.keys[0],
        cache.values[0],
        POSITIONS,
        block_tables,
        window,
        splits,
        torch.zeros(len(POSITIONS) * 2, dtype=torch.int32),
    )
    attended = reference_attention(rotated[:, 0], expected, block_tables, window)
    torch.testing.assert_close(found.float(), attended, rtol=0, atol=tolerance)
    torch.testing.assert_close(cache.keys, expected.keys, rtol=0, atol=tolerance)
    torch.testing.assert_close(cache.values, expected.values, rtol=0, atol=0)


def test_rms_norm_and_silu_multiply_equal_pytorch() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(3, 42), torch.rand(42)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (42,), weight, 1e-5))
    torch.testing.assert_close(silu_multiply(x), F.silu(x[:, :21]) * x[:, 21:])


def tiny_model(kind: str | None = None) -> XGenMM:
    torch.manual_seed(6)
    vision, resampler = VisionConfig("siglip", 16, 16, 1, 1, 28, 14), ResamplerConfig(2, 1, 1, 8)
    model = XGenMM(XGenMMConfig(vision, resampler, decoder=TINY)).eval().requires_grad_(False)
    if kind is not None:
        quantize_linear_layers(model.decoder, kind)
    return model


@pytest.mark.parametrize(
    ("rows", "kind", "few"), [(1, None, 16), (1, "fp8", 16), (5, None, 16), (5, None, 2)]
)
def test_decode_step_with_kernels_and_buckets_equals_the_plain_step(
    rows: int, kind: str | None, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_step, "FEW_ROWS", few)  # larger batches use cuBLAS
    monkeypatch.setattr(decode_step, "PROGRAMS", 20)
    model = tiny_model(kind)
    plain_cache, block_tables = noisy_cache(TINY, torch.float32)
    kernel_cache = KVCache(plain_cache.keys.clone(), plain_cache.values.clone())
    block_tables = F.pad(block_tables, (0, 0, 0, 3))  # to a bucket
    positions = F.pad(POSITIONS, (0, 3), value=-1)
    positions[rows:] = -1
    tokens = torch.zeros_like(positions)
    step = KernelDecodeStep(model, kernel_cache)
    runner = CudaGraphRunner(step, tokens, positions, block_tables, lambda function: function)
    for _ in range(2):
        tokens.random_(TINY.initial_vocab + TINY.additional_tokens)
        expected = model.decode(tokens[:rows], positions[:rows], block_tables[:rows], plain_cache)
        found, is_token = runner.decode(rows), positions[:rows] >= 0
        torch.testing.assert_close(found[is_token], expected[is_token], rtol=0, atol=1e-5)
        positions += positions >= 0
    torch.testing.assert_close(kernel_cache.keys[:, 1:], plain_cache.keys[:, 1:])
    torch.testing.assert_close(kernel_cache.values[:, 1:], plain_cache.values[:, 1:])


def test_decoding_rows_in_a_pass_with_a_prompt_equal_the_plain_ones() -> None:
    model = tiny_model()
    window, cache = TINY.window_keys, model.cache(24)
    torch.nn.init.normal_(cache.keys)
    torch.nn.init.normal_(cache.values)
    tables = (1 + torch.randperm(16)).int().view(4, 4)
    positions = torch.tensor([3, 100, 31, 64])
    embeds = torch.randn(4 + 10, TINY.hidden_size)
    prompt = prompt_segment(20, 10, torch.tensor([20, 21, 22, 23]), window, torch.float32)
    step = KernelDecodeStep(model, cache)
    found = model.forward(embeds, [step.segment(positions, tables), prompt], cache)
    plain = decode_segment(positions, tables, 101, window, torch.float32)
    expected = model.forward(embeds, [plain, prompt], cache)
    assert relative(found, expected) < 1e-5
