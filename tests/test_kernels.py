"""The Triton kernels: in the interpreter against PyTorch, and compiled for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xgenmm import kernels
from xgenmm.config import DecoderConfig

TINY = DecoderConfig(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,  # of 24: no power of two
    max_positions=128,
    sliding_window=19,
    initial_vocab=37,
)


def test_kernels_equal_pytorch_in_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=file.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


LINEAR = {
    "x": "*bf16",
    "norm": "*bf16",
    "bias": None,
    "residual": "*bf16",
    "out": "*bf16",
    "rows": "i32",
    "features": "i32",
    "x_stride": "i32",
    "weight_stride": "i32",
    "residual_stride": "i32",
    "out_stride": "i32",
    "eps": "fp32",
    "WIDTH": 3072,
}
CACHE = {
    "query": "*bf16",
    "keys": "*bf16",
    "values": "*bf16",
    "positions": "*i64",
    "cache_row_stride": "i32",
    "cache_head_stride": "i32",
    "HEADS": 32,
    "HEAD_DIM": 96,
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "arguments", "warps", "stages"),
    [
        (
            kernels._one_row_kernel,
            LINEAR
            | {"weight": "*bf16", "scale": None, "GATED": True, "ROWS": 1}
            | {"BLOCK_N": 4, "BLOCK_K": 1024},
            4,
            2,
        ),
        (
            kernels._few_rows_kernel,
            LINEAR
            | {"weight": "*i8", "scale": "*fp32", "GATED": False, "ROWS": 16}
            | {"BLOCK_N": 16, "BLOCK_K": 128},
            4,
            4,
        ),
        (
            kernels._rotate_store_kernel,
            CACHE
            | {"qkv": "*bf16", "cosine": "*fp32", "sine": "*fp32", "qkv_stride": "i32"}
            | {"HALF_BLOCK": 64},
            1,
            3,
        ),
        (
            kernels._attend_kernel,
            CACHE
            | {"out": "*bf16", "partial": "*fp32", "arrivals": "*i32", "scale": "fp32", "DIM": 128}
            | {"WINDOW": 2048, "SPLITS": 16, "SPLIT_LANES": 16, "BLOCK": 32},
            4,
            3,
        ),
    ],
    ids=["one row", "few rows", "rotate and store", "attend"],
)
def test_full_size_kernels_compile_without_spilling(
    capability: int,
    kernel: "triton.JITFunction[..., None]",
    arguments: dict[str, str | int | None],
    warps: int,
    stages: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """For A100 and H100, without either: Triton brings NVIDIA's assembler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = arguments[name]
        signature[name] = kind if isinstance(kind, str) else "constexpr"
        if not isinstance(kind, str):
            constants[(place,)] = kind
        elif kind.startswith("*") or name.endswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert "local" not in re.findall(r"\.(local)\s", compiled.asm["ptx"])
