"""Beam search against `transformers`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from xgenmm.engine.beam_search import BeamSearch
from xgenmm.engine.sampler import apply_repetition_penalty

VOCAB = 24


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def beam_case(seed: int) -> tuple[Any, Tensor, dict[str, Any]]:
    """A random decoder, a prompt [1, 4, 16] and settings with which many answers end early."""
    phi3: tuple[Any, Any] = (Phi3Config, Phi3ForCausalLM)
    make_config, make_model = phi3
    config = make_config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=3,
        attn_implementation="eager",
    )
    model = make_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return (
        model,
        torch.randn(1, 4, 16, generator=generator),
        {
            "num_beams": 2 + seed % 4,
            "max_new_tokens": 3 + seed % 11,
            "eos_token_id": [3] if seed % 3 else [3, 5],
            "repetition_penalty": 1.0 if seed % 5 else 1.5,
        },
    )


@torch.no_grad()
def beam_answer(seed: int) -> list[int]:
    model, embeddings, settings = beam_case(seed)
    search = BeamSearch(settings["num_beams"], settings["eos_token_id"], settings["max_new_tokens"])
    penalty = torch.tensor([settings["repetition_penalty"]])
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    while not search.finished:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        parents, tokens = search.advance(
            apply_repetition_penalty(logits.log_softmax(dim=-1), seen, penalty)
        )
        column = torch.tensor(tokens)[:, None]
        embeddings = torch.cat((embeddings[parents], model.model.embed_tokens(column)), dim=1)
        seen = seen[parents].scatter_(1, column, True)
    return search.best()


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # these tests pass it on purpose
@pytest.mark.parametrize("seed", range(100, 160))
def test_beam_search_equals_transformers(seed: int) -> None:
    model, embeddings, settings = beam_case(seed)
    expected = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, 4, dtype=torch.long),
        do_sample=False,
        early_stopping=False,
        length_penalty=1.0,
        pad_token_id=0,
        **settings,
    )
    assert beam_answer(seed) == expected[0].tolist()


RELEASE_4_41 = {
    248: [7, 17, 2, 8, 0, 3],
    580: [19, 10, 13, 15, 19, 7, 3],
    625: [4, 8, 21, 11, 9, 20, 19, 16, 3],
    1308: [1, 11, 0, 23, 22, 0, 14, 14, 11, 4, 22, 4, 23],
}


@pytest.mark.parametrize("seed", RELEASE_4_41)
def test_beam_search_equals_transformers_4_41_where_5_17_differs(seed: int) -> None:
    """The original implementation uses 4.41.1; in these cases, 5.17 stops earlier."""
    assert beam_answer(seed) == RELEASE_4_41[seed]


def test_one_beam_is_greedy() -> None:
    search = BeamSearch(1, end_ids=(), max_tokens=6)
    expected: list[int] = []
    while not search.finished:
        log_probs = random_logits(len(expected)).log_softmax(dim=-1)
        expected.append(int(log_probs.argmax()))
        assert search.advance(log_probs) == ([0], expected[-1:])
    assert search.best() == expected


def test_beam_search_may_finish_at_the_first_token() -> None:
    log_probs = torch.full((1, VOCAB), -50.0)
    log_probs[0, 3] = 0.0
    search = BeamSearch(1, end_ids=[3], max_tokens=100)
    search.advance(log_probs)
    assert search.finished
    assert search.best() == [3]
