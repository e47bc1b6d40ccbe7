"""A checkpoint's `config.json` in Hugging Face's terms, and vLLM's defaults for these models.

The released file states few sizes; `xgenmm.config` fills in the others.
"""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from xgenmm.checkpoints.adapter import Adapter, read_adapter
from xgenmm.checkpoints.config_json import from_json
from xgenmm.checkpoints.registry import read_config
from xgenmm.models.phi3_huggingface import phi3_config
from xgenmm.models.vision import siglip_config

ARCHITECTURE = "XGenMMModelForConditionalGeneration"
TOKENIZER_MODE = "xgenmm"
"""The name under which vLLM finds the tokenizer and the renderer."""

ADAPTER = "adapter"
"""The key of `hf_overrides` for the folder or tar of an adapter."""


class XGenMMConfig(PretrainedConfig):
    """`config.json` of v1.5, with configurations of the two parts that vLLM implements itself.

    text_config: Phi-3, with the additional tokens at the end of its vocabulary.
    vision_config: SigLIP.

    Raises ValueError for a v1 checkpoint.
    """

    model_type = "xgenmm"

    def __init__(self, **fields: Any) -> None:
        fields.setdefault("architectures", [ARCHITECTURE])
        # The preprocessor's settings affect only tiles and prompts, which do not depend on this.
        config = from_json(fields, {})
        if config.vision.tower != "siglip":
            raise ValueError(
                "model: vLLM serves xGen-MM v1.5 and demo, but this is v1, whose vision tower and "
                "resampler vLLM does not support; use a v1.5 checkpoint, or xgenmm.load for this "
                "one"
            )
        decoder = config.decoder
        # The ids of the additional tokens directly follow the first `initial_vocab` ids.
        vocab_size = decoder.initial_vocab + decoder.additional_tokens
        fields["text_config"] = phi3_config(decoder, vocab_size)
        fields["vision_config"] = siglip_config(config.vision)
        super().__init__(**fields)


class Blip3Config(XGenMMConfig):
    """v1's `config.json`, registered only so that it is refused with a clear error."""

    model_type = "blip_3"
    __init__ = XGenMMConfig.__init__  # transformers generates one for a class that defines none


class ModelDefaults(VerifyAndUpdateConfig):
    """Defaults of vLLM's settings where they differ from vLLM's own."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Use the package's prompts and tokenizer, and greedy decoding, as the authors do.

        Raises ValueError for a video model, which the folder's name or its tensors tell, and for an
        adapter that is broken or of another checkpoint.
        """
        if read_config(Path(model_config.model)).temporal is not None:
            raise ValueError(
                "model: vLLM serves the image models of xGen-MM v1.5, but this is a video model, "
                "whose temporal encoder the plugin does not have; use xgenmm.load or `xgenmm "
                "caption` for this one"
            )
        requested_adapter(model_config)
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE
        model_config.override_generation_config.setdefault("temperature", 0.0)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Distribute tiles over the devices where the vision tower's heads cannot be split."""
        model_config = vllm_config.model_config
        heads = model_config.hf_config.vision_config.num_attention_heads
        if heads % vllm_config.parallel_config.tensor_parallel_size:
            model_config.multimodal_config.mm_encoder_tp_mode = "data"


def requested_adapter(model_config: ModelConfig) -> Adapter | None:
    """Read the adapter that `hf_overrides` names, if any.

    It is not looked for in `config.json`, which may be a stranger's. Raises CheckpointError if it
    is broken or of another checkpoint.
    """
    overrides = model_config.hf_overrides
    path = overrides.get(ADAPTER) if isinstance(overrides, dict) else None
    return None if path is None else read_adapter(path, Path(model_config.model))
