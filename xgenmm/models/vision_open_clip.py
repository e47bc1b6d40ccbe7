"""The vision tower of v1, from `open_clip`.

A separate module, because `open_clip` and the torchvision it needs are not always installed.
"""

from functools import partial

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from xgenmm.config import VisionConfig


class OpenClipTower(VisionTransformer):
    """open_clip's ViT with QuickGELU; the features are its patch tokens, not the class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.hidden_size,
            layers=config.num_layers,
            heads=config.num_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            output_dim=config.output_dim,
            act_layer=QuickGELU,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, side, side] -> [tiles, patches, hidden_size]."""
        hidden = self.transformer(self._embeds(tiles))
        return self.ln_post(hidden)[:, 1:]
