"""One request without the engine: the readable reference, and the oracle of the engine's tests."""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch

from xgenmm.engine.beam_search import BeamSearch
from xgenmm.engine.sampler import (
    SamplingMetadata,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import SamplingParams
from xgenmm.models.attention import GrowingCache
from xgenmm.models.xgenmm import XGenMM

if TYPE_CHECKING:
    from xgenmm.engine.engine import Engine
    from xgenmm.engine.request import Request


def generate(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    max_tokens: int,
    end_ids: Collection[int],
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield the token ids of the answer, at most `max_tokens`, until `cancelled()`.

    Without beams, tokens are yielded as they are sampled, even after an end token; the caller has
    to stop. With beams, the whole answer is yielded at the end, its end token included.

    Args:
        embeds: the merged prompt, [length, decoder width]; `length + max_tokens` fits the context.
        max_tokens: at most `params.max_new_tokens`.
        end_ids: the tokens that end a beam.
        cancelled: called before each decode step.
    """
    if params.num_beams == 1:
        return _sample(model, embeds, params, max_tokens, cancelled)
    return _beam_search(model, embeds, params, max_tokens, end_ids, cancelled)


@torch.inference_mode()
def prompt_embeddings(engine: "Engine", request: "Request") -> torch.Tensor:
    """The embeddings of a request's prompt and images: [positions, decoder width]."""
    prompt = engine.prompt(request)
    tiles = engine.preprocess_images(request)
    return engine.model.merge_multimodal_embeddings(prompt, engine.model.encode(tiles, prompt))


@torch.inference_mode()
def answer_text(engine: "Engine", request: "Request") -> str:
    """The answer to a request, computed without the scheduler."""
    embeds, params = prompt_embeddings(engine, request), request.sampling
    model, tokenizer = engine.model, engine.tokenizer
    max_tokens = min(params.max_new_tokens, engine.config.decoder.max_positions - len(embeds))
    detokenizer, text = tokenizer.detokenizer(), ""
    for token in generate(model, embeds, params, max_tokens, engine.end_ids):
        if token in engine.end_ids:
            break
        if token not in tokenizer.specials.values():
            text += detokenizer.push(token)
    return text + detokenizer.flush()


def _sample(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    max_tokens: int,
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    cache = GrowingCache(model.config.decoder.window_keys)
    settings = SamplingMetadata.from_params([params], model.device)
    noise = uniform_noise(params).to(model.device)
    logits = next_logits(model, embeds[None], 0, cache)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for step in range(max_tokens):
        scores = apply_repetition_penalty(logits, seen, settings.penalty)
        token = sample_tokens(scores, settings, noise[step : step + 1])
        yield int(token)
        seen[0, token] = True
        if cancelled():
            return
        if step + 1 < max_tokens:
            new = model.decoder.embed(token[:, None])
            logits = next_logits(model, new, len(embeds) + step, cache)


def _beam_search(
    model: XGenMM,
    embeds: torch.Tensor,
    params: SamplingParams,
    max_tokens: int,
    end_ids: Collection[int],
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    length, device = len(embeds), model.device
    search = BeamSearch(params.num_beams, end_ids, max_tokens)
    settings = SamplingMetadata.from_params([params], device)
    cache = GrowingCache(model.config.decoder.window_keys)
    logits = next_logits(model, embeds[None], 0, cache)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    while True:
        parents, token_ids = search.advance(
            apply_repetition_penalty(logits.log_softmax(-1), seen, settings.penalty)
        )
        if cancelled():
            return
        if search.finished:
            break
        rows, tokens = torch.tensor(parents, device=device), torch.tensor(token_ids, device=device)
        seen = seen[rows].scatter(1, tokens[:, None], True)
        cache.reorder(rows)
        logits = next_logits(model, model.decoder.embed(tokens[:, None]), length, cache)
        length += 1
    yield from search.best()


@torch.inference_mode()
def next_logits(
    model: XGenMM, embeds: torch.Tensor, start: int, cache: GrowingCache
) -> torch.Tensor:
    """Extend sequences from position `start` on by [rows, t, width]; returns the next logits.

    float32 [rows, initial_vocab + additional].
    """
    positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)
    return model.logits(model.decoder(embeds, positions[None], cache)[:, -1])
