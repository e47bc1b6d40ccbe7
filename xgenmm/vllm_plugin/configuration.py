"""A checkpoint's `config.json` as vLLM reads it, and vLLM's settings that follow from it.

The released file states few sizes; `xgenmm.config` fills the rest. Knows nothing of weights.
"""

from typing import Any

from transformers import PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from xgenmm.config import from_json
from xgenmm.models.phi3_huggingface import phi3_config
from xgenmm.models.vision import siglip_config
from xgenmm.vllm_plugin import ARCHITECTURE, MODE


class XGenMMConfig(PretrainedConfig):
    """`config.json` of v1.5, with the two parts that vLLM builds itself in Hugging Face's terms.

    text_config: Phi-3 with the additional tokens as part of its vocabulary.
    vision_config: SigLIP.
    """

    model_type = "xgenmm"

    def __init__(self, **stated: Any) -> None:
        stated.setdefault("architectures", [ARCHITECTURE])
        # Only tiles and prompts depend on the preprocessor, and those are not read from here.
        config = from_json(stated, {})
        if config.vision.tower != "siglip":
            raise ValueError(
                "model: vLLM serves xGen-MM v1.5 and demo, but this is v1, whose tower and sampler "
                "it does not have; use a v1.5 checkpoint, or xgenmm.load for this one"
            )
        decoder = config.decoder
        # Ids of the additional tokens follow the first `initial_vocab` without a gap.
        vocab_size = decoder.initial_vocab + decoder.additional_tokens
        stated["text_config"] = phi3_config(decoder, vocab_size)
        stated["vision_config"] = siglip_config(config.vision)
        super().__init__(**stated)


class Blip3Config(XGenMMConfig):
    """v1's `config.json` under its own name: recognised so that it is refused in clear words."""

    model_type = "blip_3"
    __init__ = XGenMMConfig.__init__  # or transformers gives the class one of its own


class Defaults(VerifyAndUpdateConfig):
    """Settings of vLLM that a person leaves open and that must not be vLLM's own."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Our own prompts and text; greedy decoding, as the models are meant to be run."""
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = MODE
        model_config.override_generation_config.setdefault("temperature", 0.0)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Share out tiles instead of heads where the tower's heads cannot be divided."""
        model_config = vllm_config.model_config
        heads = model_config.hf_config.vision_config.num_attention_heads
        if heads % vllm_config.parallel_config.tensor_parallel_size:
            model_config.multimodal_config.mm_encoder_tp_mode = "data"
