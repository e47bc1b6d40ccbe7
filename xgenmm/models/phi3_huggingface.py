"""The one mapping from our Phi-3 decoder to Hugging Face's: configuration and weights.

vLLM builds its own Phi-3 from the configuration; tests and benchmarks compare the decoder with the
one of `transformers`.
"""

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from xgenmm.config import DecoderConfig
from xgenmm.models.phi3 import Phi3Decoder


def phi3_config(config: DecoderConfig, vocab_size: int | None = None) -> Phi3Config:
    """The decoder's sizes under Hugging Face's names.

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
            # Current releases of transformers and vLLM count the position itself.
            "sliding_window": config.window_keys,
            "layer_types": ["sliding_attention"] * config.num_layers,
            # Known to the tokenizer; the defaults lie outside small vocabularies.
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
    )


def to_transformers(decoder: Phi3Decoder, dtype: torch.dtype) -> Phi3ForCausalLM:
    """`transformers`' Phi-3 with the decoder's weights, without the additional tokens.

    Tensors that have `dtype` already are shared with the decoder.
    """
    with torch.device("meta"):
        model = Phi3ForCausalLM(phi3_config(decoder.config))
    weights = decoder.state_dict()
    model.load_state_dict({n: weights[n].to(dtype) for n in model.state_dict()}, assign=True)
    # The rotary frequencies are not in the state dict, so they are still on the meta device.
    with decoder.lm_head.weight.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval().requires_grad_(False)
