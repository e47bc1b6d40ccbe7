"""Images of a request -> tiles for the model, and their positions in the prompt.

Tiling, ids and counts are the package's own; this module only says them in vLLM's terms. Knows
nothing of text: a prompt arrives as ids, in which a run stands for each image.
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


class ImageInfo(BaseProcessingInfo):
    """What vLLM asks about the images of a model."""

    @cached_property
    def config(self) -> XGenMMConfig:
        """The checkpoint's configuration."""
        return read_config(Path(self.ctx.model_config.model))

    @cached_property
    def run(self) -> list[int]:
        """The ids that stand for one image in a prompt."""
        ids, run = self.config.additional_ids, [IMAGE]
        if self.config.text.prompt == "few_shot":
            run += [IMAGE_PLACEHOLDER] * (self.config.resampler.num_latents - 1)
        return [ids[token] for token in run]

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Vision tokens of the image with the most tiles."""
        tile, grids = self.config.vision.image_size, self.config.tiling.grids
        most = max(((w // tile) * (h // tile) for w, h in grids), default=0)
        return {"image": self.config.resampler.num_latents * (1 + most)}


class DummyImages(BaseDummyInputsBuilder[ImageInfo]):
    """The images with which vLLM measures memory: those with the most tiles."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text: `ImageProcessor.get_dummy_inputs` gives ids."""
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        """White images of the largest canvas."""
        tile, grids = self.info.config.vision.image_size, self.info.config.tiling.grids
        size = max(grids, key=lambda canvas: canvas[0] * canvas[1], default=(tile, tile))
        return {"image": [Image.new("RGB", size, "white")] * mm_counts.get("image", 0)}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):
    """Cuts images into tiles, and widens the run of each to its vision tokens."""

    requires_tokenizer = False

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        """A prompt of images and nothing else."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        items = self.info.parse_mm_data(data, validate=False)
        return ProcessorInputs(self.info.run * mm_counts.get("image", 0), items)

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Tiles of all images.

        pixels: uint8 [tiles, tile, tile, 3]. layout: int64 [images, 4], the canvas in columns
        and rows of tiles, and the image's width and height.
        """
        if "image" not in mm_items:
            return BatchFeature()
        config = self.info.config
        items = mm_items.get_items("image", ImageProcessorItems)
        tiles = [
            tile_image(_image(item), config.tiling, config.vision.image_size) for item in items.data
        ]
        layout = [(one.columns, one.rows, *one.image_size) for one in tiles]
        pixels = torch.from_numpy(np.concatenate([one.pixels for one in tiles]))
        return BatchFeature({"pixels": pixels, "layout": torch.tensor(layout)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        layout = hf_inputs.get("layout", torch.empty(0, 4, dtype=torch.int64))
        return {
            "pixels": MultiModalFieldConfig.flat_from_sizes("image", tile_counts(layout)),
            "layout": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image = self.info.config.additional_ids[IMAGE]
        latents = self.info.config.resampler.num_latents

        def vision_tokens(number: int) -> list[int]:
            layout = out_mm_kwargs["image"][number].get_data()["layout"]
            return [image] * (latents * int(tile_counts(layout)))

        return [PromptReplacement("image", target=self.info.run, replacement=vision_tokens)]


def tile_counts(layout: torch.Tensor) -> torch.Tensor:
    """int64 [..., 4] -> [...]: the tiles of each image, the whole one included."""
    return 1 + layout[..., 0] * layout[..., 1]


def _image(item: object) -> Image.Image:
    """An image as the rest of the package sees it, from its file where vLLM has kept that."""
    if isinstance(item, MediaWithBytes):
        return read_image(item.original_bytes)
    if isinstance(item, Image.Image):
        return item
    raise ValueError(f"image: must be an image of PIL, not {type(item).__name__}")
