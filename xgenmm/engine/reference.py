"""Prefill and decode steps of one answer: embeddings in, token ids out.

Knows nothing of text. Sampling itself is in `sampling.py`; here are the cache and the loop.
"""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch

from xgenmm.engine.sampler import (
    BeamSearch,
    SamplingMetadata,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.models.xgenmm import XGenMM

if TYPE_CHECKING:
    from xgenmm.engine.engine import Engine, Request


def generate(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    limit: int,
    end_ids: Collection[int],
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield the answer's token ids, at most `limit` of them; none after `cancelled()`.

    A single stream goes on past an end id for as long as one asks it to, each token as it is
    made. Beams end at `end_ids` and come all at once, the end id included.

    Args:
        embeds: the fused prompt, [length, decoder width]; `length + limit` fits the context.
        limit: at most `params.max_new_tokens`.
        cancelled: asked before each step.
    """
    if params.num_beams == 1:
        return _stream(model, embeds, params, limit, cancelled)
    return _search(model, embeds, params, limit, end_ids, cancelled)


@torch.inference_mode()
def prompt_embeddings(engine: "Engine", request: "Request") -> torch.Tensor:
    """A request's prompt with its images merged in: [positions, decoder width]."""
    prompt = engine.prompt(request)
    tiles = [engine.preprocess_image(image) for image in request.images]
    return engine.model.merge_multimodal_embeddings(prompt, engine.model.encode(tiles, prompt))


@torch.inference_mode()
def answer_text(engine: "Engine", request: "Request") -> str:
    """The text of a request's answer by the model alone, without the scheduler."""
    embeds, params = prompt_embeddings(engine, request), request.sampling
    model, tokenizer = engine.model, engine.tokenizer
    limit = min(params.max_new_tokens, engine.config.decoder.max_positions - len(embeds))
    detokenizer, text = tokenizer.detokenizer(), ""
    for token in generate(model, embeds, params, limit, engine.end_ids):
        if token in engine.end_ids:
            break
        if token not in tokenizer.specials.values():
            text += detokenizer.push(token)
    return text + detokenizer.flush()


def _stream(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    limit: int,
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    length = embeds.shape[0]
    cache = model.cache(1, length + limit)
    settings = SamplingMetadata.of([params], model.device)
    uniform = uniform_noise(params).to(model.device)
    logits = model.prefill([embeds], cache)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for step in range(limit):
        scores = apply_repetition_penalty(logits, seen, settings.penalty)
        token = sample_tokens(scores, settings, uniform[step : step + 1])
        yield int(token)
        seen[0, token] = True
        if cancelled():
            return
        if step + 1 < limit:
            position = length + step
            logits = model.decode(token, token.new_tensor([position]), cache, position + 1)


def _search(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    limit: int,
    end_ids: Collection[int],
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    length, device = embeds.shape[0], model.device
    search = BeamSearch(params.num_beams, end_ids, limit)
    settings = SamplingMetadata.of([params], device)
    prompt = model.cache(1, length)
    logits = model.prefill([embeds], prompt)
    cache = model.cache(params.num_beams, length + limit)
    cache.keys[:, :, :, :length] = prompt.keys
    cache.values[:, :, :, :length] = prompt.values
    seen = torch.zeros_like(logits, dtype=torch.bool)
    while True:
        parents, chosen = search.advance(
            apply_repetition_penalty(logits.log_softmax(-1), seen, settings.penalty)
        )
        if cancelled():
            return
        if search.finished:
            break
        rows, tokens = torch.tensor(parents, device=device), torch.tensor(chosen, device=device)
        seen = seen[rows].scatter(1, tokens[:, None], True)
        cache.reorder(rows, length)
        logits = model.decode(tokens, torch.full_like(tokens, length), cache, length + 1)
        length += 1
    yield from search.best()
