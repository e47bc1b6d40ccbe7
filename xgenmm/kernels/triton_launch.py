"""Launches Triton kernels, or only compiles them.

The reference for each kernel is a few lines of PyTorch in `models/`, which the tests compare it
with. Nothing synchronizes with the device and launches depend on argument shapes only, so they can
be captured in a CUDA graph. On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1
before the first import), as in the tests.
"""

from typing import Any

import torch
import triton


def launch(
    kernel: "triton.JITFunction[..., None]",
    grid: tuple[int, ...],
    x: torch.Tensor,
    *others: Any,
    **options: Any,
) -> None:
    """Launch a kernel, or only compile it if `x` is on the meta device."""
    kernel.run(x, *others, grid=grid, warmup=x.is_meta, **options)
