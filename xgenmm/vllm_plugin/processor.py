"""Image input for vLLM: cut images into tiles and expand their placeholders in the prompt.

Adapts the package's tiling to vLLM's interface. A prompt arrives as ids, in which every image is
represented by the same run of placeholder ids.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
)

from xgenmm.checkpoints.registry import read_config
from xgenmm.config import XGenMMConfig
from xgenmm.preprocessing.images import read_image
from xgenmm.preprocessing.prompts import IMAGE, IMAGE_PLACEHOLDER
from xgenmm.preprocessing.tiling import tile_image


class XGenMMProcessingInfo(BaseProcessingInfo):
    """Limits and sizes of image input."""

    @cached_property
    def config(self) -> XGenMMConfig:
        """The checkpoint's configuration."""
        return read_config(Path(self.ctx.model_config.model))

    @cached_property
    def placeholder_ids(self) -> list[int]:
        """The ids that stand for one image in a prompt."""
        tokens = [IMAGE]
        if self.config.text.prompt == "few_shot":
            tokens += [IMAGE_PLACEHOLDER] * (self.config.resampler.num_latents - 1)
        return [self.config.additional_ids[token] for token in tokens]

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Allow any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the number of vision tokens of an image with the most tiles."""
        tile, grids = self.config.vision.image_size, self.config.tiling.grids
        max_tiles = 1 + max(((w // tile) * (h // tile) for w, h in grids), default=0)
        return {"image": self.config.resampler.num_latents * max_tiles}


class XGenMMDummyInputsBuilder(BaseDummyInputsBuilder[XGenMMProcessingInfo]):
    """Images with the most tiles, with which vLLM measures its peak memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return no text: `XGenMMMultiModalProcessor.get_dummy_inputs` returns ids."""
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        """Return white images that fill the largest canvas."""
        tile, grids = self.info.config.vision.image_size, self.info.config.tiling.grids
        size = max(grids, key=lambda canvas: canvas[0] * canvas[1], default=(tile, tile))
        return {"image": [Image.new("RGB", size, "white")] * mm_counts.get("image", 0)}


class XGenMMMultiModalProcessor(BaseMultiModalProcessor[XGenMMProcessingInfo]):
    """Cuts images into tiles and replaces each placeholder by the ids of its vision tokens."""

    requires_tokenizer = False

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        """Return a prompt of nothing but images."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(self.info.placeholder_ids * mm_counts.get("image", 0), items)

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Return the tiles of all images.

        pixels: uint8 [tiles, tile, tile, 3].
        layout: int64 [images, 4]: columns and rows of the canvas in tiles, width and height of the
            image in pixels.
        """
        if "image" not in mm_items:
            return BatchFeature()
        config = self.info.config
        items = mm_items.get_items("image", ImageProcessorItems)
        images = [
            tile_image(_load(item), config.tiling, config.vision.image_size) for item in items.data
        ]
        layout = [(image.columns, image.rows, *image.image_size) for image in images]
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
        return BatchFeature({"pixels": pixels, "layout": torch.tensor(layout)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        layout = hf_inputs.get("layout", torch.empty(0, 4, dtype=torch.int64))
        return {
            "pixels": MultiModalFieldConfig.flat_from_sizes("image", count_tiles(layout)),
            "layout": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_id = self.info.config.additional_ids[IMAGE]
        num_latents = self.info.config.resampler.num_latents

        def vision_token_ids(index: int) -> list[int]:
            layout = out_mm_kwargs["image"][index].get_data()["layout"]
            return [image_id] * (num_latents * int(count_tiles(layout)))

        placeholder = self.info.placeholder_ids
        return [PromptReplacement("image", target=placeholder, replacement=vision_token_ids)]


def count_tiles(layout: torch.Tensor) -> torch.Tensor:
    """int64 [..., 4] -> [...]: the number of tiles of each image, including the whole image."""
    return 1 + layout[..., 0] * layout[..., 1]


def _load(item: object) -> Image.Image:
    """Return an image; if vLLM has kept the bytes of its file, the package decodes them."""
    if isinstance(item, MediaWithBytes):
        return read_image(item.original_bytes)
    if isinstance(item, Image.Image):
        return item
    raise ValueError(f"image: must be a PIL image, not {type(item).__name__}")
