"""Vision towers: normalized tiles -> patch features.

SigLIP (v1.5) comes from `transformers`, ViT-H (v1) from `open_clip` (`vision_open_clip.py`). Both
are built without weights, under the released parameter names (`vlm.vision_encoder.*`).
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipAttention

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


class FusedAttention(nn.Module):
    """A SigLIP layer's attention with one product for queries, keys and values."""

    def __init__(self, attention: SiglipAttention) -> None:
        """Copy the weights of `attention`, or share those of its output layer."""
        super().__init__()
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), False)
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), False)
        self.out_proj = attention.out_proj
        self.num_heads = attention.num_heads

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None = None
    ) -> tuple[torch.Tensor, None]:
        """[tiles, patches, hidden_size] -> the same shape, and no attention weights."""
        qkv = F.linear(hidden_states, self.weight, self.bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


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


def fuse_attention(tower: nn.Module) -> None:
    """Compute queries, keys and values of a tower's layers in one product each, not in three.

    For inference with loaded weights: the parameters no longer have the released names. ViT-H is
    built like that, so nothing changes.
    """
    if isinstance(tower, SiglipTower):
        for layer in tower.encoder.layers:
            layer.self_attn = FusedAttention(cast(SiglipAttention, layer.self_attn))
