"""The training's losses: of the tower's features, of the vision tokens, and of the answers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from scripts.demo_model.checkpoint import CONFIG, SIDE
from scripts.demo_model.labelled_images import (
    CENTER_CLASSES,
    COVER_CLASSES,
    LabelledImage,
    label_sets,
)
from scripts.demo_model.packing import Rows
from xgenmm.models.attention import UncachedAttention
from xgenmm.models.image_features import regroup
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.tiling import TiledImage

# The 2 x 2 cells that each latent learns to describe: int64 [latents, 4].
BLOCKS = rearrange(
    torch.arange(SIDE * SIDE), "(r y c x) -> (r c) (y x)", r=SIDE // 2, y=2, c=SIDE // 2, x=2
)
CELLS_PER_LATENT = BLOCKS.shape[1]
# How much more a cell weighs if something covers it, or has its centre in it: most do not.
RARITY = (4.0, 20.0)


class Heads(nn.Module):
    """Linear heads that predict cells' classes from tower features and from vision tokens.

    Only the training uses them; the checkpoint does not contain them.
    """

    def __init__(self) -> None:
        super().__init__()
        classes = COVER_CLASSES + CENTER_CLASSES
        self.feature = nn.Linear(CONFIG.vision.hidden_size, classes)
        self.place = nn.Linear(CONFIG.vision.hidden_size, 2 * SIDE)
        self.token = nn.Linear(CONFIG.decoder.hidden_size, CELLS_PER_LATENT * classes)


def compute_losses(
    model: XGenMM,
    heads: Heads,
    weights: Mapping[str, float],
    images: Sequence[LabelledImage],
    rows: Rows | None,
) -> tuple[dict[str, torch.Tensor], dict[str, list[bool]]]:
    """The losses of a batch by name, and which answers are right by the question's kind.

    Parts of the model whose loss has no entry in `weights` are frozen.
    """
    if weights.keys() == {"tower"}:
        return {"tower": _sparse_tower_loss(model, heads, images)}, {}
    losses: dict[str, torch.Tensor] = {}
    right: dict[str, list[bool]] = {}
    tiles = [image.tiles for image in images]
    trained = "tower" in weights
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        # All tiles as one image of one column, since the tower's labels are of ungrouped tiles.
        merged = TiledImage(np.concatenate([t.pixels for t in tiles]), 0, 0, (1, 1))
        features = model.features([merged])[0]
        regrouped = _regroup_images(features, tiles)
    if trained:
        losses["tower"] = tower_loss(heads, features, _cells(images))
    trained = "resampler" in weights
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        vision = model.vision_tokens(tiles, regrouped)
    if trained:
        sets = torch.cat([label_sets(image) for image in images], dim=1)
        width = CONFIG.decoder.hidden_size
        tokens = torch.cat(vision).view(-1, CONFIG.resampler.num_latents, width)
        losses["resampler"] = resampler_loss(heads, tokens, sets)
    if rows is not None:
        losses["answer"], right = answer_loss(model, vision, rows)
    return losses, right


def tower_loss(heads: Heads, features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of cover, centre, and the cell's own row and column.

    Row and column are known from the position embedding, but must survive in the features: the
    resampler has no other source for a feature's place.

    features: [tiles, cells, width]. cells: int64 [2, tiles, cells].
    """
    split = heads.feature(features).float().split([COVER_CLASSES, CENTER_CLASSES], dim=-1)
    loss = split[0].new_zeros(())
    for logits, labels, rarity in zip(split, cells, RARITY, strict=True):
        errors = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        weight = 1.0 + rarity * (labels.flatten() > 0)
        loss = loss + (errors * weight).sum() / weight.sum()
    cell = torch.arange(SIDE * SIDE).expand(features.shape[0], -1)
    row, column = heads.place(features).float().transpose(1, 2).split(SIDE, dim=1)
    return loss + F.cross_entropy(row, cell // SIDE) + F.cross_entropy(column, cell % SIDE)


def resampler_loss(heads: Heads, vision: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the label sets.

    vision: [tiles, latents, width]. sets: int64 [2, tiles, cells, 3], from `label_sets`.
    """
    sets = sets[:, :, BLOCKS.flatten()]
    logits = heads.token(vision).float().unflatten(-1, (CELLS_PER_LATENT, -1)).flatten(1, 2)
    split = logits.split([COVER_CLASSES, CENTER_CLASSES], dim=-1)
    loss = logits.new_zeros(())
    for predicted, labels, rarity in zip(split, sets, RARITY, strict=True):
        weight = 1.0 + rarity * (labels > 0).any(-1)
        target = torch.zeros_like(predicted).scatter_(-1, labels, 1.0)
        errors = F.binary_cross_entropy_with_logits(
            predicted[..., 1:], target[..., 1:], reduction="none"
        )
        loss = loss + (errors.sum(-1) * weight).sum() / weight.sum()
    return loss


def answer_loss(
    model: XGenMM, vision: Sequence[torch.Tensor], rows: Rows
) -> tuple[torch.Tensor, dict[str, list[bool]]]:
    """Weighted cross-entropy of the answers, and which of them are right by kind.

    An answer is right if each token is the most likely one given the right tokens before it, that
    is, if greedy decoding returns exactly this answer.
    """
    embeds = model.decoder.embed(rows.ids)
    is_image = rows.ids == CONFIG.additional_ids["<image>"]
    images = torch.cat([vision[i] for i in rows.shown])
    embeds = embeds.masked_scatter(is_image[..., None], images.to(embeds.dtype))
    branch = rows.branch
    length = branch.shape[1]
    related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = model.decoder(embeds, rows.positions, UncachedAttention((related & causal)[:, None]))
    learnt = rows.labels >= 0
    labels = rows.labels[learnt]
    # Logits of additional tokens directly follow those of the vocabulary, as their ids do.
    logits = model.decoder.lm_head(hidden[learnt]).float()
    weight = rows.weight[learnt]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
    wrong = logits.argmax(-1) != labels
    row, _ = learnt.nonzero(as_tuple=True)
    missed = {(int(r), int(b)) for r, b in zip(row[wrong], branch[learnt][wrong], strict=True)}
    right: dict[str, list[bool]] = defaultdict(list)
    for r, kinds in enumerate(rows.kinds):
        for b, kind in enumerate(kinds, 1):
            right[kind].append((r, b) not in missed)
    return loss, right


def _sparse_tower_loss(
    model: XGenMM, heads: Heads, images: Sequence[LabelledImage]
) -> torch.Tensor:
    """The tower's loss on each whole image and at most two other tiles.

    Tiles that show nothing are left out: they teach nothing new.
    """
    chosen = []
    for image in images:
        full = 1 + image.cover[1:].flatten(1).any(1).nonzero().flatten()
        chosen.append([0, *full[:2].tolist()])
    pairs = list(zip(images, chosen, strict=True))
    pixels = np.concatenate([image.tiles.pixels[tiles] for image, tiles in pairs])
    cells = _cells(
        [
            LabelledImage(image.tiles, image.cover[tiles], image.center[tiles])
            for image, tiles in pairs
        ]
    )
    return tower_loss(heads, model.features([TiledImage(pixels, 0, 0, (1, 1))])[0], cells)


def _cells(images: Sequence[LabelledImage]) -> torch.Tensor:
    """Cover and centre classes of all tiles: int64 [2, tiles, cells]."""
    cover = torch.cat([image.cover for image in images])
    center = torch.cat([image.center for image in images])
    return torch.stack([cover, center]).flatten(2)


def _regroup_images(features: torch.Tensor, tiles: Sequence[TiledImage]) -> list[torch.Tensor]:
    """Split the features of all tiles by image and regroup each image's."""
    parts = features.split([t.pixels.shape[0] for t in tiles])
    return [regroup(f, t.columns, t.rows) for f, t in zip(parts, tiles, strict=True)]
