"""The vision tower against `transformers`, as it is and with fused products."""

import pytest
import torch
from transformers import SiglipVisionModel

from xgenmm.config import VisionConfig
from xgenmm.models.vision import SiglipTower, fuse_attention, siglip_config

CONFIG = VisionConfig("siglip", 48, 80, num_layers=2, num_heads=3, image_size=56, patch_size=14)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_tower_equals_transformers(fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    original = SiglipVisionModel(siglip_config(CONFIG)).eval()
    for parameter in original.parameters():
        parameter.normal_(0, 0.2)  # biases too, which start at 0
    original.to(dtype)
    with torch.device("meta"):
        tower = SiglipTower(CONFIG)
    tower.load_state_dict(original.state_dict(), assign=True)
    if fused:
        fuse_attention(tower)
        assert not any("q_proj" in name for name in tower.state_dict())
    tiles = torch.randn(3, 3, 56, 56, dtype=dtype)
    expected = original(tiles).last_hidden_state
    torch.testing.assert_close(tower(tiles), expected)
