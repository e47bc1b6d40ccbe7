"""The model as it is trained: a batch of rows -> the sum of its loss."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from xgenmm.finetuning.batch import IGNORED, Row, SpecialIds, embed_rows
from xgenmm.models.attention import UncachedAttention
from xgenmm.models.xgenmm import XGenMM


class TrainedModel(nn.Module):
    """A model whose `forward` is the loss, so that DDP and FSDP can wrap it.

    There is no dropout, so training mode makes no difference.

    Attributes:
        all_parts: whether the resampler takes part in every batch, even in one without images:
            several devices gather parameters, or sum gradients, of each part together.
    """

    def __init__(self, model: XGenMM, special: SpecialIds, *, autocast: bool = False) -> None:
        """autocast: compute matrix products in bfloat16, whatever the dtype of the weights."""
        super().__init__()
        self.model = model
        self.special = special
        self.all_parts = False
        self._autocast = autocast

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """Sum the cross-entropy of all labels of a batch: float32, differentiable.

        It is 0, with gradients of 0, if the batch has no label. Logits are computed only where
        there is a label.
        """
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._autocast):
            return self._summed_loss(rows)

    def _summed_loss(self, rows: Sequence[Row]) -> torch.Tensor:
        inputs = embed_rows(self.model, rows, self.special, always_resample=self.all_parts)
        rows_and_length = inputs.targets.shape
        positions = torch.arange(rows_and_length[1], device=inputs.embeds.device)
        hidden = self.model.decoder(
            inputs.embeds, positions.expand(rows_and_length), UncachedAttention(inputs.visible)
        )
        learned = inputs.targets != IGNORED
        logits = self.model.logits(hidden[learned])
        return F.cross_entropy(logits, inputs.targets[learned], reduction="sum")

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are trained, by their released names."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def drop_resampler_gradients(self) -> None:
        """Leave the resampler without gradients, as after a step of text only."""
        for parameter in self.model.vlm.vision_tokenizer.parameters():
            parameter.grad = None


def freeze_vision(model: XGenMM) -> None:
    """Train what the authors train: everything but the vision tower, the whole vocabulary too."""
    model.requires_grad_(True)
    model.vlm.vision_encoder.requires_grad_(False)


def checkpoint_gradients(model: XGenMM) -> None:
    """Recompute the activations of the decoder's and resampler's layers in the backward pass.

    The memory of a batch is then that of one layer, for about a third more time.
    """
    resampler = cast(Sequence[nn.ModuleList], model.vlm.vision_tokenizer.layers)
    parts = [part for layer in resampler for part in layer]
    for module in (*model.decoder.model.layers, *parts):
        recomputed = partial(checkpoint, module.forward, use_reentrant=False)
        setattr(module, "forward", recomputed)  # noqa: B010 - mypy refuses to assign to a method
