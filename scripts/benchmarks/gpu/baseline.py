"""`transformers` on the same decoder weights."""

import torch
from transformers import Phi3ForCausalLM

from scripts.benchmarks.gpu.device import Device, Size
from scripts.benchmarks.gpu.prompt import embed
from scripts.benchmarks.random_data import photo_jpeg
from scripts.benchmarks.report import Row
from scripts.benchmarks.transformers_baseline import time_generate
from xgenmm.models.phi3_huggingface import to_transformers
from xgenmm.models.xgenmm import XGenMM


def baseline(device: Device, model: XGenMM, size: Size, one_word: float) -> list[Row]:
    """Measure decode steps and a one-word answer; the model's own takes `one_word` seconds.

    Changes the model's dtype.
    """
    rows = []
    torch.manual_seed(3)
    embeds = (torch.randn(1, size.context, size.config.decoder.hidden_size) * 0.02).to(
        device.device
    )
    for dtype in dict.fromkeys((device.dtype, torch.float32)):
        model.to(dtype)
        theirs = to_transformers(model.decoder, dtype)
        name = f"transformers {str(dtype).removeprefix('torch.')}"
        prompt = embeds.to(dtype)
        time_generate(theirs, prompt, 4)
        token = min(time_generate(theirs, prompt, size.tokens)[1] for _ in range(2))
        rows.append(Row(name, "decode, batch 1", 1 / token, "tokens/s"))
        seconds = _answer_seconds(device, model, theirs, size)
        rows.append(Row(name, "one word, from JPEG bytes", 1e3 * seconds, "ms"))
        if dtype == torch.float32:
            goal = 15.0 if device.cuda else None
            ratio = seconds / one_word
            rows.append(Row(name, "one word, against ours", ratio, "x", at_least=goal))
        if device.cuda and dtype == device.dtype:
            # With a static cache, `generate` compiles the decode step.
            options = {"cache_implementation": "static"}
            for _ in range(2):
                time_generate(theirs, prompt, size.tokens, **options)
            _, token = time_generate(theirs, prompt, size.tokens, **options)
            rows.append(
                Row(f"{name}, static cache, compiled", "decode, batch 1", 1 / token, "tokens/s")
            )
        del theirs
    return rows


def _answer_seconds(device: Device, model: XGenMM, theirs: Phi3ForCausalLM, size: Size) -> float:
    """Seconds of a one-word answer on one image, with this model's vision and their decoder."""
    image = photo_jpeg(size.image, 0)

    def answer() -> None:
        with torch.inference_mode():
            time_generate(theirs, embed(model, [image], size.text)[None], 2)

    return device.seconds(answer, size.rounds)
