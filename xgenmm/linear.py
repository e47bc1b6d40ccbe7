"""Linear layers of float32 models on a CPU.

PyTorch gives float32 products to MKL, which leaves half of an AMD processor's vector width unused,
and bfloat16 ones to oneDNN. oneDNN does float32 as exactly, and there twice as fast.
"""

import os

import torch
from torch import nn
from torch.nn import functional as F

SMALL = 1 << 20
"""Elements of a weight from which on oneDNN is the quicker one for a single row as well."""

KEPT_KERNELS = 256
"""That oneDNN keeps, one for each layer's and input's shape, some 0.2 MB each; by itself 1,024."""


class OneDnnLinear(nn.Linear):
    """A float32 linear layer on a CPU, by oneDNN where that is the quicker one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if x.numel() == x.shape[-1] and self.weight.numel() < SMALL:
            return F.linear(x, self.weight, self.bias)
        # The operator that torch.compile makes of a linear layer; no public one leads to it.
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return product


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a float32 model on a CPU as quick as they can be; in place.

    Names, shapes and values stay. Matrices are stored by column, as both libraries read them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))  # read once
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
        if type(module) is nn.Linear and there:
            module.__class__ = OneDnnLinear  # nothing but `forward` differs
