"""Multiple choice: the likelihood of each given answer after a prompt."""

from collections.abc import Sequence

import torch

from xgenmm.config import TextConfig
from xgenmm.engine.request import EngineRequest
from xgenmm.models.kv_cache import KVCache
from xgenmm.models.transfer import to_device
from xgenmm.models.xgenmm import XGenMM
from xgenmm.preprocessing.prompts import ASSISTANT, END_OF_CHUNK
from xgenmm.preprocessing.tokenizer import SpecialToken, Tokenizer


def choice_token_ids(tokenizer: Tokenizer, text: TextConfig, choice: str) -> list[int]:
    """The token ids with which the model would write a choice, its end token included."""
    if text.prompt == "few_shot":
        before = after = END_OF_CHUNK
    else:
        before, after = ASSISTANT, SpecialToken(text.stop_tokens[0])
    ids = tokenizer.encode_segments([before, choice, after])
    return ids[ids.index(tokenizer.id(before)) + 1 :]


def score_choices(
    model: XGenMM,
    kv_cache: KVCache,
    request: EngineRequest,
    logits: torch.Tensor,
    max_chunk_tokens: int,
) -> torch.Tensor:
    """Log-probability of each choice of a request after its prompt: float32 [choices].

    All choices continue the same cached prompt. Several are computed in one pass, as many as fit
    `max_chunk_tokens`.

    logits: [1, vocab], the logits after the prompt, which score the first token of each choice.
    """
    first = logits[0].log_softmax(-1)
    scores = [first[choice[0]] for choice in request.choices]
    start, slot = request.num_computed_tokens, request.slots[0]
    room = min(max_chunk_tokens, model.config.decoder.max_positions - start)
    for group in _groups(request.choices, room):
        texts = [request.choices[index][:-1] for index in group]
        for index, rows in zip(
            group, model.score_continuations(texts, start, slot, kv_cache), strict=True
        ):
            following = to_device(torch.tensor(request.choices[index][1:]), rows.device)
            scores[index] = scores[index] + rows.log_softmax(-1).gather(1, following[:, None]).sum()
    return torch.stack(scores)


def _groups(choices: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """Indices of the choices of more than one token, in groups of at most `room` tokens.

    A choice longer than `room` is a group of its own.
    """
    groups: list[list[int]] = []
    used = room
    for index, choice in enumerate(choices):
        if len(choice) == 1:
            continue
        if used + len(choice) > room:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += len(choice)
    return groups
