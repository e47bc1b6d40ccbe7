"""vLLM plugin: serve v1.5 image checkpoints with continuous batching and tensor parallelism.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes. From then on `--model FOLDER` accepts every v1.5 image checkpoint and the demo.

    configuration.py  config.json -> vLLM's configuration and defaults
    processor.py      images -> tiles, and the number of their tokens in the prompt
    tokenizer.py      text <-> ids, with the package's tokenizer
    renderer.py       chat messages -> prompt ids, with the package's prompts
    model.py          vLLM's SigLIP and Phi-3 with the package's resampler

It relies on vLLM's internals, so it registers only with the minor version that it was written for.
"""

import logging

PACKAGE = "xgenmm.vllm_plugin"
VLLM_VERSION = "0.32"

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the configuration, model, tokenizer and renderer with vLLM. Idempotent."""
    import vllm

    if not vllm.__version__.startswith(f"{VLLM_VERSION}."):
        logger.warning(
            "the xgenmm plugin needs vLLM %s and is disabled in vLLM %s",
            VLLM_VERSION,
            vllm.__version__,
        )
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from xgenmm.vllm_plugin.configuration import (
        ARCHITECTURE,
        TOKENIZER_MODE,
        Blip3Config,
        ModelDefaults,
        XGenMMConfig,
    )

    for config in (XGenMMConfig, Blip3Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ModelDefaults
    # By name, because vLLM's processes must not initialize CUDA while they import plugins.
    ModelRegistry.register_model(ARCHITECTURE, f"{PACKAGE}.model:XGenMMForCausalLM")
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = (f"{PACKAGE}.tokenizer", "VllmTokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = (f"{PACKAGE}.renderer", "PromptRenderer")
