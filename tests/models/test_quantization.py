"""Quantised weights, layers and models, and quantisation of a checkpoint as it is read."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.models.test_xgenmm import random_decoder, run
from tests.support import tiny
from xgenmm.checkpoints.loading import load_parameters
from xgenmm.checkpoints.registry import read_config
from xgenmm.errors import InputError
from xgenmm.models.quantization import (
    QUANTIZATIONS,
    QuantizedLinear,
    check_quantization,
    drift,
    quantize_linear_layers,
    quantize_weight,
)
from xgenmm.models.xgenmm import XGenMM

# Maximum error of a weight relative to its feature's largest weight: half a step of int8; half of
# the relative spacing of fp8 (3 mantissa bits), 1/8.
MAX_ERROR = {"int8": 0.5 / 127, "fp8": 1 / 16}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_weights_are_quantised_to_within_half_a_step(kind: str) -> None:
    torch.manual_seed(0)
    exact = torch.randn(20, 64)
    exact[3] = 0
    weight, scale = quantize_weight(exact, kind)
    assert weight.dtype == QUANTIZATIONS[kind][0]
    error = (weight.float() * scale[:, None] - exact).abs().amax(dim=1)
    assert (error <= MAX_ERROR[kind] * exact.abs().amax(dim=1) * 1.001).all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_quantised_layer_multiplies_by_its_dequantised_weights(
    kind: str, dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(1)
    layer = QuantizedLinear(*quantize_weight(torch.randn(48, 64), kind))
    x = torch.randn(2, rows, 64).to(dtype)
    expected = F.linear(x.float(), layer.weight.float() * layer.scale[:, None])
    found = layer(x)
    assert (found.dtype, found.shape) == (dtype, (2, rows, 48))
    assert (found.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.03), ("fp8", 0.1)])
def test_logits_of_a_quantised_decoder_drift_little(kind: str, limit: float) -> None:
    decoder = random_decoder()
    embeds = torch.randn(30, decoder.config.hidden_size)
    exact = decoder.lm_head(run(decoder, embeds, [20, 10]))
    quantize_linear_layers(decoder, kind)
    assert sum(isinstance(layer, QuantizedLinear) for layer in decoder.modules()) == 8
    moved = drift(exact, decoder.lm_head(run(decoder, embeds, [20, 10])))
    assert 0 < moved.relative < limit
    assert moved.agreement > 0.8
    assert moved.divergence >= 0


def test_drift_ignores_a_constant_offset() -> None:
    torch.manual_seed(2)
    logits = torch.randn(5, 30)
    same = drift(logits, logits + 3)
    assert same.relative == pytest.approx(0, abs=1e-6)
    assert same.agreement == 1
    assert same.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_checkpoint_is_quantised_as_it_is_read(tmp_path: Path, kind: str) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    states = []
    for quantize in (None, kind):
        with torch.device("meta"):
            model = XGenMM(read_config(folder))
        load_parameters(model, folder, device="cpu", dtype=torch.float32, quantize=quantize)
        states.append(model.state_dict())
    plain, found = states
    layers = [name.removesuffix(".scale") for name in found if name.endswith(".scale")]
    assert len(layers) == 4 * 2
    for layer in layers:
        weight, scale = quantize_weight(plain.pop(f"{layer}.weight"), kind)
        torch.testing.assert_close(found.pop(f"{layer}.weight"), weight, rtol=0, atol=0)
        torch.testing.assert_close(found.pop(f"{layer}.scale"), scale, rtol=0, atol=0)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_unknown_quantisation_is_rejected() -> None:
    with pytest.raises(InputError, match="quantize: 'int3' is not one of int8, fp8"):
        check_quantization("int3", torch.device("cpu"))
