"""Conversion of the Phi-3 decoder to Hugging Face's: configuration and weights.

vLLM builds its own Phi-3 from this configuration; tests and benchmarks compare the decoder with
the implementation in `transformers`.
"""

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from xgenmm.config import DecoderConfig
from xgenmm.models.phi3 import Phi3Decoder


def phi3_config(config: DecoderConfig, vocab_size: int | None = None) -> Phi3Config:
    """Build the Hugging Face configuration.

    vocab_size: by default that of the embedding without the additional tokens.
    """
    return Phi3Config.from_dict(
        {
            "architectures": ["Phi3ForCausalLM"],
            "vocab_size": config.vocab_size if vocab_size is None else vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "max_position_embeddings": config.max_positions,
            "original_max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            # The window of current transformers and vLLM releases includes the token itself.
            "sliding_window": config.window_keys,
            "layer_types": ["sliding_attention"] * config.num_layers,
            # The tokenizer defines these; the defaults are out of range for small vocabularies.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
    )


def to_transformers(decoder: Phi3Decoder, dtype: torch.dtype) -> Phi3ForCausalLM:
    """Build the Phi-3 of `transformers` with the decoder's weights, without additional tokens.

    Tensors that already have `dtype` are shared with the decoder.
    """
    with torch.device("meta"):
        model = Phi3ForCausalLM(phi3_config(decoder.config))
    weights = decoder.state_dict()
    model.load_state_dict({n: weights[n].to(dtype) for n in model.state_dict()}, assign=True)
    # The state dict has no rotary frequencies, so these are still on the meta device.
    with decoder.lm_head.weight.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval().requires_grad_(False)
