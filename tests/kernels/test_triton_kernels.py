"""The Triton kernels: results in the interpreter, and compilation for GPUs without a GPU."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from xgenmm.config import BLOCK_SIZE, INTERLEAVE, RELEASES, DecoderConfig
from xgenmm.kernels import triton_attention, triton_linear
from xgenmm.kernels.cuda_graphs import compile_kernels, needed_buckets
from xgenmm.kernels.decode_step import KernelDecodeStep
from xgenmm.models.quantization import quantize_linear_layers
from xgenmm.models.xgenmm import XGenMM

TINY = DecoderConfig(
    vocab_size=40,
    hidden_size=48,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,  # of width 24, which is not a power of two
    max_positions=128,
    sliding_window=19,
    initial_vocab=37,
)


@pytest.mark.parametrize("name", ["interpreted_kernels.py", "interpreted_self_check.py"])
def test_kernels_in_the_interpreter(name: str) -> None:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=file.parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


class FakeDriver:
    """The part of Triton's driver that compilation uses, without a device."""

    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> list[CompiledKernel]:
    """Kernels compiled during a test, for an H100 or the compute capability given as parameter."""
    found: list[CompiledKernel] = []

    def record(*, key: str, fn: Any, **_: Any) -> None:
        found.append(fn.jit_function.device_caches[fake.get_current_device()][0][key])

    fake = FakeDriver()
    fake.capability = getattr(request, "param", fake.capability)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    monkeypatch.setattr(driver, "_active", fake)
    for jit in (*vars(triton_attention).values(), *vars(triton_linear).values()):
        if isinstance(jit, triton.JITFunction):
            jit.device_caches.clear()
    return found


def stack_bytes(kernel: CompiledKernel, folder: Path) -> int:
    """Memory of each thread's stack, where the assembler puts what does not fit its registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bSTACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


@pytest.mark.parametrize(
    ("compiled", "quantize"),
    [(80, None), (80, "int8"), (90, None), (90, "fp8")],
    indirect=["compiled"],
)
def test_full_size_kernels_compile_without_register_spills(
    compiled: list[CompiledKernel], quantize: str | None, tmp_path: Path
) -> None:
    """For A100 and H100; Triton ships NVIDIA's assembler and disassembler."""
    compile_kernels(RELEASES[INTERLEAVE], 256, torch.bfloat16, quantize)
    assert len(compiled) >= 17
    for kernel in compiled:
        assert stack_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_decode_step_launches_only_kernels_that_were_compiled_ahead(
    quantize: str | None, compiled: list[CompiledKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 20
    config = replace(RELEASES[INTERLEAVE], decoder=TINY)
    compile_kernels(config, rows, torch.bfloat16, quantize)
    compiled_ahead = len(compiled)
    assert compiled_ahead > 10

    launched = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: object, warmup: bool, **options: object) -> None:
        launched.append(kernel)
        run(kernel, *arguments, warmup=True, **options)

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    with torch.device("meta"):
        model = XGenMM(config)
    model.decoder.to_empty(device="cpu").bfloat16()
    if quantize is not None:
        quantize_linear_layers(model, quantize)
    step = KernelDecodeStep(model, model.cache(1))
    block_tables = torch.zeros(256, TINY.max_positions // BLOCK_SIZE, dtype=torch.int32)
    for bucket in needed_buckets(rows):
        inputs = torch.zeros(bucket, dtype=torch.long)
        step(inputs, inputs, block_tables[:bucket])
    assert len(launched) > 50
    assert len(compiled) == compiled_ahead
