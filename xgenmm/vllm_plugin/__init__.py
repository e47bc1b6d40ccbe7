"""vLLM plugin: serves the same checkpoints with continuous batching and tensor parallelism.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its
processes. From then on `--model FOLDER` works for every checkpoint with v1.5's sampler:

    configuration.py  config.json -> a configuration as vLLM reads it; defaults; what is refused
    processor.py      images -> tiles, and how many positions they take in the prompt
    text.py           messages -> ids, and ids -> text, by the package's own convention
    model.py          vLLM's SigLIP and Phi-3 around the package's sampler

Written for the internals of one minor version of vLLM, and registered with no other.
"""

import logging

VERSION = "0.32"
ARCHITECTURE = "XGenMMModelForConditionalGeneration"
MODE = "xgenmm"  # vLLM's name for a way to make prompts and text

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM of our configuration, model, tokenizer and prompts. May be called again."""
    import vllm

    if not vllm.__version__.startswith(f"{VERSION}."):
        logger.warning("xgenmm serves from vLLM %s, not from %s", VERSION, vllm.__version__)
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from xgenmm.vllm_plugin.configuration import Blip3Config, Defaults, XGenMMConfig

    for config in (XGenMMConfig, Blip3Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = Defaults
    # By name: what vLLM's processes import before they choose a device is kept small.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:XGenMMForCausalLM")
    TokenizerRegistry.tokenizers[MODE] = (f"{__name__}.text", "VllmTokens")
    RENDERER_REGISTRY.renderers[MODE] = (f"{__name__}.text", "PromptRenderer")
