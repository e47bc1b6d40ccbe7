"""Vision towers: normalized tiles -> patch features.

SigLIP (v1.5) comes from `transformers`, ViT-H (v1) from `open_clip` (`vision_open_clip.py`). Both
are built without weights, under the released parameter names (`vlm.vision_encoder.*`).
"""

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from xgenmm.config import VisionConfig


def siglip_config(config: VisionConfig) -> SiglipVisionConfig:
    """Build the configuration of `transformers`."""
    return SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )


class SiglipTower(SiglipVisionModel):
    """SigLIP; the features are its last hidden state. The pooling head is loaded but unused."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(siglip_config(config))
        # Not in the checkpoint, so a model built on the meta device would never get its values.
        self.embeddings.register_buffer("position_ids", None)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, 3, side, side] -> [tiles, patches, hidden_size]."""
        patches = self.embeddings.patch_embedding(tiles).flatten(2).transpose(1, 2)
        hidden = patches + self.embeddings.position_embedding.weight
        hidden = self.encoder(inputs_embeds=hidden).last_hidden_state
        return self.post_layernorm(hidden)


def build_tower(config: VisionConfig) -> nn.Module:
    """Build the configured tower on the current default device."""
    if config.tower == "siglip":
        return SiglipTower(config)
    # Imported on demand: vLLM's environment has no open_clip.
    from xgenmm.models.vision_open_clip import OpenClipTower

    return OpenClipTower(config)
