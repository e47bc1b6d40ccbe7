"""`transformers` on the same decoder weights."""

from collections.abc import Iterator

import torch
from transformers import Phi3ForCausalLM

from scripts.benchmarks.gpu.context import ONE_REQUEST_BYTES, Context
from scripts.benchmarks.gpu.engine import WORD, answer_seconds
from scripts.benchmarks.gpu.figures import Figure
from scripts.benchmarks.transformers_baseline import time_generate
from xgenmm import Engine, read_image
from xgenmm.models.phi3_huggingface import to_transformers
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import Prompt
from xgenmm.preprocessing.tiling import tile_image


def transformers(context: Context) -> Iterator[Figure]:
    """Measure decode steps and a one-word answer, as the published packagings run them: eager.

    In the model's dtype also with a static cache, for which `generate` compiles the decode step.
    """
    size, device, model = context.size, context.device, context.model
    ours = _our_seconds(context)
    torch.manual_seed(3)
    shape = (1, size.context, size.config.decoder.hidden_size)
    embeds = (torch.randn(shape) * 0.02).to(device.device)
    for dtype in dict.fromkeys((device.dtype, torch.float32)):
        name = str(dtype).removeprefix("torch.")
        model.to(dtype)
        theirs = to_transformers(model.decoder, dtype)
        prompt = embeds.to(dtype)
        time_generate(theirs, prompt, 4)
        token = min(time_generate(theirs, prompt, size.tokens)[1] for _ in range(2))
        yield Figure(f"{name}: decode, batch 1", 1 / token, "tokens/s")
        seconds = _their_seconds(context, model, theirs)
        yield Figure(f"{name}: one word, from JPEG bytes", 1e3 * seconds, "ms")
        yield Figure(f"{name}: one word against ours", seconds / ours, "x")
    if device.cuda:
        model.to(device.dtype)
        theirs = to_transformers(model.decoder, device.dtype)
        prompt, options = embeds.to(device.dtype), {"cache_implementation": "static"}
        for _ in range(2):
            time_generate(theirs, prompt, size.tokens, **options)
        _, token = time_generate(theirs, prompt, size.tokens, **options)
        yield Figure("static cache, compiled: decode, batch 1", 1 / token, "tokens/s")
    context.drop_model()  # float32 has lost no bits, but other stages expect it as it was made


def _our_seconds(context: Context) -> float:
    """Seconds of a one-word answer by the engine, with nothing cached."""
    engine = Engine(context.model, context.tokenizer, 1, ONE_REQUEST_BYTES, prefix_caching=False)
    try:
        question = WORD * context.size.text

        def answer() -> None:
            answer_seconds(engine, context.image(0), question, 2)

        return context.device.seconds(answer, context.size.rounds)
    finally:
        engine.close()


def _their_seconds(context: Context, model: XGenMM, theirs: Phi3ForCausalLM) -> float:
    """Seconds of a one-word answer with this model's vision and their decoder."""
    config, file = model.config, context.image(0)
    prompt = Prompt(tuple(range(1 + context.size.text)), ((0, 1),))

    def answer() -> None:
        image = tile_image(read_image(file), config.tiling, config.vision.image_size)
        with torch.inference_mode():
            embeds = model.merge_multimodal_embeddings(prompt, model.encode([image], prompt))
            time_generate(theirs, embeds[None], 2)

    return context.device.seconds(answer, context.size.rounds)
