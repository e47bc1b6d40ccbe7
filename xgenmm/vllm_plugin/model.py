"""The model as vLLM runs it: its SigLIP and its Phi-3, which shard, and the package's sampler.

Whatever the released weights need beyond the stock parts is here: regrouped tiles and the padding
mask before the sampler, the additional tokens' rows joined to the vocabulary's, and the output
layer's bias. The sliding window and the sizes are in `configuration.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.model_executor.models.vision import is_vit_use_data_parallel, run_dp_sharded_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from xgenmm.checkpoints.registry import read_config
from xgenmm.models.image_features import normalize, padding_mask, regroup
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.preprocessing.prompts import IMAGE
from xgenmm.vllm_plugin.processor import DummyImages, ImageInfo, ImageProcessor, tile_counts

_ADDITIONAL = ("additional_embedding.", "additional_fc.")


class Phi3WithBias(Phi3ForCausalLM):
    """vLLM's Phi-3 with a bias in its output layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                bias=True,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[positions, width] -> [positions, vocabulary], on the first of the sharing devices."""
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=DummyImages)
class XGenMMForCausalLM(nn.Module, SupportsMultiModal, SupportsPP):
    """xGen-MM v1.5. The sampler is whole on each device: it is small."""

    _mark_tower_model: Callable[..., AbstractContextManager[None]]
    _mark_language_model: Callable[..., AbstractContextManager[None]]

    supports_encoder_tp_data = True
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "vlm.vision_encoder.": "vision_encoder.vision_model.",
            "vlm.vision_tokenizer.": "vision_tokenizer.",
            "vlm.lang_model.": "lang_model.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.config = config = read_config(Path(vllm_config.model_config.model))
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_encoder = SiglipVisionModel(
                hf_config.vision_config,
                vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "vision_encoder"),
            )
            self.vision_tokenizer = PerceiverResampler(
                config.resampler, config.vision.hidden_size, config.decoder.hidden_size
            )
        with self._mark_language_model(vllm_config):
            self.lang_model = Phi3WithBias(
                vllm_config=vllm_config.with_hf_config(hf_config.text_config),
                prefix=maybe_prefix(prefix, "lang_model"),
            )
        self.make_empty_intermediate_tensors = self.lang_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """What stands for an image in a message."""
        return IMAGE

    def embed_multimodal(self, **inputs: torch.Tensor) -> MultiModalEmbeddings:
        """Tiles of several requests -> vision tokens of each image, [tiles * latents, width].

        `inputs` are those of `ImageProcessor`, joined; none if there is no image.
        """
        if "pixels" not in inputs:
            return []
        config, pixels, layout = self.config, inputs["pixels"], inputs["layout"]
        tiles = normalize(pixels, config.tiling, next(self.vision_tokenizer.parameters()).dtype)
        if is_vit_use_data_parallel():
            features = run_dp_sharded_vision_model(tiles, self.vision_encoder)
        else:
            features = self.vision_encoder(tiles)
        counts = tile_counts(layout).tolist()
        parts, masks = [], []
        for (columns, rows, width, height), part in zip(
            layout.tolist(), features.split(counts), strict=True
        ):
            parts.append(regroup(part, columns, rows))
            masks.append(padding_mask(columns, rows, (width, height), config.vision.grid))
        mask = torch.cat(masks).to(pixels.device)
        tokens: torch.Tensor = self.vision_tokenizer(torch.cat(parts), mask)
        return [one.flatten(0, 1) for one in tokens.split(counts)]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Ids or embeddings -> final hidden states [positions, width]."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.lang_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[positions, width] -> [positions, initial_vocab + additional]."""
        return self.lang_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the released parameters; returns the names that were filled."""
        joined = _joined(weights, self.config.decoder.initial_vocab)
        return AutoWeightsLoader(self).load_weights(joined, mapper=self.hf_to_vllm_mapper)


def _joined(
    weights: Iterable[tuple[str, torch.Tensor]], initial_vocab: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The vocabulary's rows and those of the additional tokens as one, whichever comes first.

    Of the vocabulary's rows only the first `initial_vocab` are ever used.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, rows in weights:
        whole = name
        for part in _ADDITIONAL:
            whole = whole.replace(part, "")
        if not whole.startswith(("vlm.lang_model.lm_head.", "vlm.lang_model.model.embed_tokens.")):
            yield name, rows
        elif whole not in waiting:
            waiting[whole] = rows
        else:
            other = waiting.pop(whole)
            known, additional = (other, rows) if name != whole else (rows, other)
            yield whole, torch.cat([known[:initial_vocab], additional])
