"""xGen-MM for vLLM: vLLM's SigLIP and Phi-3, which support tensor parallelism, and our resampler.

What the released weights need beyond these parts is here: regrouped tiles and the padding mask
before the resampler, the rows of the additional tokens appended to the vocabulary's, and the bias
of the output layer. The sliding window and all sizes are in `configuration.py`.
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

from xgenmm.checkpoints.adapter import Adapter
from xgenmm.checkpoints.registry import read_config
from xgenmm.models.image_features import normalize, padding_mask, regroup
from xgenmm.models.resampler import PerceiverResampler
from xgenmm.preprocessing.prompts import IMAGE
from xgenmm.vllm_plugin.configuration import requested_adapter
from xgenmm.vllm_plugin.processor import (
    XGenMMDummyInputsBuilder,
    XGenMMMultiModalProcessor,
    XGenMMProcessingInfo,
    count_tiles,
)

_ADDITIONAL_PREFIXES = ("additional_embedding.", "additional_fc.")


class Phi3WithBias(Phi3ForCausalLM):
    """vLLM's Phi-3 with a bias in the output layer."""

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
        """[positions, width] -> logits, [positions, vocabulary]; None where vLLM gathers none."""
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)


@MULTIMODAL_REGISTRY.register_processor(
    XGenMMMultiModalProcessor, info=XGenMMProcessingInfo, dummy_inputs=XGenMMDummyInputsBuilder
)
class XGenMMForCausalLM(nn.Module, SupportsMultiModal, SupportsPP):
    """xGen-MM v1.5. Each device has the whole resampler (110 million parameters)."""

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
        self._model_config = vllm_config.model_config
        self.config = config = read_config(Path(self._model_config.model))
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
        """Return the text that stands for an image in a message."""
        return IMAGE

    def embed_multimodal(self, **inputs: torch.Tensor) -> MultiModalEmbeddings:
        """Return the vision tokens of each image, [tiles * latents, width].

        inputs: `pixels` and `layout` of `XGenMMMultiModalProcessor`, concatenated over the images
            of several requests; empty if there are no images.
        """
        if "pixels" not in inputs:
            return []
        config, pixels, layout = self.config, inputs["pixels"], inputs["layout"]
        tiles = normalize(pixels, config.tiling, next(self.vision_tokenizer.parameters()).dtype)
        if is_vit_use_data_parallel():
            features = run_dp_sharded_vision_model(tiles, self.vision_encoder)
        else:
            features = self.vision_encoder(tiles)
        counts = count_tiles(layout).tolist()
        regrouped, masks = [], []
        for (columns, rows, width, height), image_features in zip(
            layout.tolist(), features.split(counts), strict=True
        ):
            regrouped.append(regroup(image_features, columns, rows))
            masks.append(padding_mask(columns, rows, (width, height), config.vision.grid))
        mask = torch.cat(masks).to(pixels.device)
        tokens: torch.Tensor = self.vision_tokenizer(torch.cat(regrouped), mask)
        return [image_tokens.flatten(0, 1) for image_tokens in tokens.split(counts)]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Ids or embeddings -> final hidden states, [positions, width]."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.lang_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[positions, width] -> logits, [positions, initial_vocab + additional_tokens]."""
        return self.lang_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the released parameters, and an adapter; return the names of those that were set."""
        adapter = requested_adapter(self._model_config)
        if adapter is not None:
            weights = merge_adapter(weights, adapter)
        merged = append_additional_rows(weights, self.config.decoder.initial_vocab)
        return AutoWeightsLoader(self).load_weights(merged, mapper=self.hf_to_vllm_mapper)


def merge_adapter(
    weights: Iterable[tuple[str, torch.Tensor]], adapter: Adapter
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge an adapter into the parameters that it changes, which become float32."""
    for name, weight in weights:
        yield name, adapter.merge(name, weight.float()) if name in adapter.names else weight


def append_additional_rows(
    weights: Iterable[tuple[str, torch.Tensor]], initial_vocab: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Append the additional tokens' rows to the vocabulary's, in embedding and output layer.

    The released files keep them as separate parameters, in any order. Of the vocabulary's rows
    only the first `initial_vocab` are used.
    """
    unpaired: dict[str, torch.Tensor] = {}
    for name, rows in weights:
        merged_name = name
        for prefix in _ADDITIONAL_PREFIXES:
            merged_name = merged_name.replace(prefix, "")
        if not merged_name.startswith(
            ("vlm.lang_model.lm_head.", "vlm.lang_model.model.embed_tokens.")
        ):
            yield name, rows
        elif merged_name not in unpaired:
            unpaired[merged_name] = rows
        else:
            first = unpaired.pop(merged_name)
            vocab, additional = (first, rows) if name != merged_name else (rows, first)
            yield merged_name, torch.cat([vocab[:initial_vocab], additional])
