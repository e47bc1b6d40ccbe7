"""A model that costs nothing, so that only the engine's own work is left to measure."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from xgenmm.engine import model_runner
from xgenmm.kernels.cuda_graphs import DecodePath
from xgenmm.models.phi3 import AdditionalLinear, Phi3Decoder
from xgenmm.models.xgenmm import XGenMM

MAX_ROWS = 128
TOKEN = 262  # " the" in the demo's vocabulary


@contextmanager
def free_model() -> Iterator[None]:
    """Replace the decoder by constant logits, for all models: every answer repeats one word.

    Decode steps go the way that they go on a GPU. The tensors have the usual shapes, so sampling
    and everything after it do their usual work.
    """
    with (
        patch.object(model_runner, "build_decode_step", _build_decode_step),
        patch.object(Phi3Decoder, "forward", _forward),
        patch.object(AdditionalLinear, "forward", _logits),
    ):
        yield


def _build_decode_step(model: XGenMM, *_: Any) -> DecodePath:
    config = model.config.decoder
    logits = _constant_logits(config.initial_vocab + config.additional_tokens)
    return DecodePath("kernels", "they cost nothing", lambda rows: logits[:rows])


def _forward(decoder: Phi3Decoder, embeds: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return embeds


def _logits(layer: AdditionalLinear, hidden: torch.Tensor) -> torch.Tensor:
    vocab = layer.initial_vocab + layer.additional_fc.out_features
    return _constant_logits(vocab)[:1].expand(*hidden.shape[:-1], vocab)


@cache
def _constant_logits(vocab: int) -> torch.Tensor:
    logits = torch.zeros(MAX_ROWS, vocab)
    logits[:, TOKEN] = 1
    return logits
