"""The losses of the training: of what the tokens tell about each frame, and of the answers."""

from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from scripts.demo_model.losses import answer_loss
from scripts.demo_model.packing import Rows
from scripts.demo_video.checkpoint import CONFIG, temporal_encoder
from scripts.demo_video.frames import NUM_CLASSES
from xgenmm.models.xgenmm import XGenMM

MAX_FRAMES = 8
# How much more a block weighs if a shape covers it, or has its center in it: most do not.
RARITY = (4.0, 8.0)


class Heads(nn.Module):
    """A linear head that tells a block's content in each frame from its vision token.

    Only the training uses it; the checkpoint does not contain it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(CONFIG.decoder.hidden_size, MAX_FRAMES * 2 * NUM_CLASSES)


def clip_tokens(model: XGenMM, latents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The vision tokens of many clips of one length, as `XGenMM.clip_tokens` computes those of one.

    Groups of the Token Turing Machine share nothing but their weights, so the latents of all clips
    are groups of one larger clip, and any of them can be left out.

    latents: [clips, frames, num_latents, width]. kept: bool [clips, num_latents].

    Returns [number of kept latents, decoder width].
    """
    resampler = model.vlm.vision_tokenizer
    encoder = temporal_encoder(model)
    chosen = kept.flatten()
    memory = encoder.initial_memory.repeat(len(latents), 1, 1)[chosen]
    merged = latents.transpose(0, 1).flatten(1, 2)[:, chosen]
    pooled = functional_call(encoder, {"initial_memory": memory}, (merged,))
    tokens: torch.Tensor = resampler.projection(resampler.norm(pooled))
    return tokens


def compute_losses(
    model: XGenMM,
    heads: Heads,
    latents: torch.Tensor,
    labels: torch.Tensor,
    rows: Rows,
    kept: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """The losses of a batch by name, and which answers are right by the question's kind.

    latents: [clips, frames, num_latents, width]. labels: int64 [clips, 2, frames, num_latents].
    kept: bool [clips, num_latents]; the decoder does not see the tokens of other latents.
    """
    tokens = clip_tokens(model, latents, kept)
    vision = tokens.new_zeros(*kept.shape, tokens.shape[-1]).masked_scatter(kept[..., None], tokens)
    is_image = rows.ids == CONFIG.additional_ids["<image>"]
    branch = rows.branch.masked_scatter(is_image, kept.long() - 1)
    answer, right = answer_loss(model, list(vision), replace(rows, branch=branch))
    by_token = labels.permute(0, 3, 1, 2)[kept]
    return {"labels": label_loss(heads, tokens, by_token), "answer": answer}, right


def choose_latents(labels: torch.Tensor, empty: float) -> torch.Tensor:
    """All latents whose block shows something at any time, and a random share of the others.

    labels: int64 [clips, 2, frames, num_latents]. Returns bool [clips, num_latents].
    """
    full = (labels > 0).any(2).any(1)
    return full | (torch.rand(full.shape) < empty)


def label_loss(heads: Heads, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of what each token's block shows in each frame.

    tokens: [n, width]. labels: int64 [n, 2, frames].
    """
    logits = heads.token(tokens).float().unflatten(-1, (2, MAX_FRAMES, NUM_CLASSES))
    logits = logits[:, :, : labels.shape[2]]
    loss = logits.new_zeros(())
    for i, rarity in enumerate(RARITY):
        label = labels[:, i].flatten()
        errors = F.cross_entropy(logits[:, i].flatten(0, 1), label, reduction="none")
        weight = 1.0 + rarity * (label > 0)
        loss = loss + (errors * weight).sum() / weight.sum()
    return loss
