"""Sampling against `transformers`."""

import math

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xgenmm.engine.sampler import (
    SamplingMetadata,
    apply_repetition_penalty,
    apply_token_masks,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import SamplingParams

VOCAB = 24


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sampled(logits: Tensor, params: list[SamplingParams], noise: list[float]) -> list[int]:
    settings = SamplingMetadata.from_params(params, logits.device)
    return sample_tokens(logits, settings, torch.tensor(noise)).tolist()


def test_greedy_takes_the_first_of_equally_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 2.0, 2.0, -1.0]])
    assert sampled(logits, [SamplingParams()] * 2, [0.9, 0.9]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_distribution_equals_transformers(temperature: float, top_k: int, top_p: float) -> None:
    steps = 4096
    logits = random_logits(round(temperature * 10) + top_k)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(dim=-1)[0]

    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    noise = [step / steps for step in range(steps)]
    tokens = sampled(logits.expand(steps, -1), [params] * steps, noise)
    shares = torch.bincount(torch.tensor(tokens), minlength=VOCAB) / steps
    assert (shares - expected).abs().max() <= 1.5 / steps
    assert (expected[tokens] > 0).all()
    assert expected[tokens[0]] == expected[expected > 0].min(), "noise 0 is the rarest kept token"


def test_top_k_keeps_ties_as_transformers_does() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    kept = TopKLogitsWarper(2)(None, logits)[0].isfinite().nonzero()[:, 0].tolist()
    params = [SamplingParams(temperature=1.0, top_k=2)] * 64
    tokens = sampled(logits.expand(64, -1), params, [step / 64 for step in range(64)])
    assert sorted(set(tokens)) == kept == [1, 2, 3]


def test_forbidden_token_is_never_sampled() -> None:
    logits = random_logits(1)
    logits[0, ::2] = -math.inf
    logits[0, 5] = -200.0  # its probability is 0 in float32
    params = [SamplingParams(temperature=1.0)] * 3
    tokens = sampled(logits.expand(3, -1), params, [0.0, 0.5, 1 - 2**-24])
    assert all(token % 2 == 1 and token != 5 for token in tokens)


def test_extreme_settings_sample_the_most_likely_token() -> None:
    logits = random_logits(2)
    for params in (
        SamplingParams(temperature=1e-39),
        SamplingParams(temperature=2.0, top_p=1e-30),
        SamplingParams(temperature=2.0, top_k=1),
    ):
        assert sampled(logits, [params], [0.0]) == [int(logits.argmax())]


def test_rows_are_independent() -> None:
    rows = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=1.5, top_k=3, seed=2),
        SamplingParams(temperature=1.0, top_p=0.5, seed=3, repetition_penalty=2.0),
        SamplingParams(repetition_penalty=1.3),
    ]
    logits = random_logits(4, rows=len(rows))
    seen = random_logits(5, rows=len(rows)) > 2
    noise = torch.stack([uniform_noise(row)[0] for row in rows])

    def tokens(indices: list[int]) -> list[int]:
        settings = SamplingMetadata.from_params([rows[i] for i in indices], "cpu")
        penalized = apply_repetition_penalty(logits[indices], seen[indices], settings.penalty)
        return sample_tokens(penalized, settings, noise[indices]).tolist()

    together = tokens([0, 1, 2, 3, 4])
    assert together == [tokens([i])[0] for i in range(len(rows))]
    assert together == tokens([4, 3, 2, 1, 0])[::-1]


def test_half_precision_logits_are_sampled_as_in_float32() -> None:
    logits = random_logits(6).bfloat16()
    params = [SamplingParams(temperature=1.0)]
    assert sampled(logits, params, [0.4]) == sampled(logits.float(), params, [0.4])


def test_noise_is_reproducible_and_independent_of_max_new_tokens() -> None:
    short = uniform_noise(SamplingParams(max_new_tokens=5, seed=7))
    for length in (15, 16, 17, 100, 2048):
        longer = uniform_noise(SamplingParams(max_new_tokens=length, seed=7))
        assert longer.shape == (length,)
        assert torch.equal(longer[:5], short)
    assert (longer >= 0).all()
    assert (longer < 1).all()
    assert not torch.equal(short, uniform_noise(SamplingParams(max_new_tokens=5, seed=8)))
    unseeded = SamplingParams(max_new_tokens=5)
    assert not torch.equal(uniform_noise(unseeded), uniform_noise(unseeded))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(8, rows=3)
    history = torch.tensor([[1, 2, 2, 7], [0, 0, 0, 0], [23, 22, 21, 20]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, history, True)
    assert torch.equal(apply_repetition_penalty(logits, seen, torch.full((3,), penalty)), expected)


def test_token_masks_exclude_tokens_of_their_rows_only() -> None:
    logits = random_logits(9, rows=2)
    masked = apply_token_masks(logits, {1: torch.arange(VOCAB) < 3})
    assert torch.equal(masked[0], logits[0])
    assert torch.equal(masked[1, :3], logits[1, :3])
    assert (masked[1, 3:] == -math.inf).all()
    assert logits.isfinite().all()
