"""Linear layers of float32 models on a CPU.

PyTorch gives float32 products to MKL, which leaves half of an AMD processor's vector width unused,
and bfloat16 ones to oneDNN. oneDNN does float32 as exactly, and there twice as fast.
"""

import os
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.siglip.modeling_siglip import SiglipMLP

SMALL = 1 << 20
"""Elements of a weight from which on oneDNN is the quicker one for a single row as well."""

KEPT_KERNELS = 256
"""That oneDNN keeps, one for each layer's and input's shape, some 0.2 MB each; by itself 1,024."""


class OneDnnLinear(nn.Linear):
    """A float32 linear layer on a CPU, by oneDNN where that is the quicker one."""

    gelu = ""
    """How the GELU that is part of the layer is computed, `tanh` or `none` (the exact one); it
    spares a pass over the result, and the memory for another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if x.numel() == x.shape[-1] and self.weight.numel() < SMALL and not self.gelu:
            return F.linear(x, self.weight, self.bias)
        # The operator that torch.compile makes of a linear layer; no public one leads to it.
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu" if self.gelu else "none", [], self.gelu
        )
        return product


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a float32 model on a CPU as quick as they can be; in place.

    Names, shapes and values stay. Matrices are stored by column, as both libraries read them.
    GELUs become part of the layer before them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))  # read once
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
        if type(module) is nn.Linear and there:
            module.__class__ = OneDnnLinear  # nothing but `forward` differs
    for module in list(model.modules()):
        if (
            isinstance(module, SiglipMLP)
            and module.config.hidden_act == "gelu_pytorch_tanh"
            and isinstance(module.fc1, OneDnnLinear)
        ):
            module.fc1.gelu = "tanh"
            module.activation_fn = nn.Identity()
        elif isinstance(module, nn.Sequential):
            for number, (layer, then) in enumerate(pairwise(module)):
                if isinstance(layer, OneDnnLinear) and isinstance(then, nn.GELU):
                    layer.gelu = then.approximate
                    module[number + 1] = nn.Identity()
