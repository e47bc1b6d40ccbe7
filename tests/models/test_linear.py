"""The linear layers of a float32 model on a CPU against PyTorch's own."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMLP

from tests.models.test_xgenmm import random_decoder
from xgenmm.models.linear import OneDnnLinear, use_onednn


def test_names_shapes_and_values_stay() -> None:
    decoder = random_decoder()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    use_onednn(decoder)
    after = decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert decoder.lm_head.weight.stride() == (1, decoder.config.vocab_size)
    assert sum(type(module) is OneDnnLinear for module in decoder.modules()) > 4
    assert not any(type(module) is nn.Linear for module in decoder.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 5), (2, 3, 4), (0,)])
@pytest.mark.parametrize(("width", "features"), [(24, 37), (1024, 1031)])  # of both sorts
@torch.inference_mode()
def test_results_are_as_exact(
    bias: bool, shape: tuple[int, ...], width: int, features: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, features, bias=bias)
    x = torch.randn(*shape, 2 * width)[..., ::2]  # nothing that lies together
    expected = layer.double()(x.double())
    use_onednn(layer.float())
    found = layer(x)
    assert type(layer) is OneDnnLinear
    assert found.shape == (*shape, features)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SiglipMLP(SiglipVisionConfig(hidden_size=24, intermediate_size=37)),
        lambda: nn.Sequential(nn.Linear(24, 37), nn.GELU(), nn.Linear(37, 24)),
        lambda: nn.Sequential(nn.Linear(24, 37, bias=False), nn.GELU("tanh")),
    ],
    ids=["siglip", "exact", "tanh"],
)
@torch.inference_mode()
def test_gelu_is_part_of_the_layer_before_it(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = build(), 4 * torch.randn(3, 24)
    expected = block.double()(x.double())
    use_onednn(block.float())
    assert sum(isinstance(module, nn.Identity) for module in block.modules()) == 1
    for rows in (x, x[:1]):
        torch.testing.assert_close(
            block(rows).double(), expected[: len(rows)], rtol=1e-5, atol=1e-5
        )


def test_another_activation_stays() -> None:
    block = SiglipMLP(SiglipVisionConfig(hidden_size=24, intermediate_size=37, hidden_act="relu"))
    use_onednn(block)
    assert isinstance(block.fc1, OneDnnLinear)
    assert not block.fc1.gelu
    assert not isinstance(block.activation_fn, nn.Identity)
