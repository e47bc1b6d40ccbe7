"""Logits in, tokens out: repetition penalty, temperature, top-k and top-p.

All functions are pure, vectorized over rows with one request per row, each with its own settings.
Their shapes are fixed and they never wait for the device, as CUDA graphs require.

Randomness is an input: `uniform_noise` draws one number for each token of a request, and a token is
sampled by inverting the cumulative distribution at that number. So the same request with the same
seed gives the same tokens regardless of the rest of the batch.

The filters equal `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper`
and `TopPLogitsWarper` of `transformers` 4.41, in this order. Only the random numbers differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xgenmm.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling settings of a batch as tensors [rows] on the logits' device.

    any_sampled: whether any row has a temperature above 0; otherwise sorting is skipped.
    """

    temperature: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int64; 0 is off
    tail: Tensor  # float32, 1 - top_p: the probability to cut off
    penalty: Tensor  # float32; 1 is off
    any_sampled: bool

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], device: torch.device | str
    ) -> "SamplingMetadata":
        """Row i gets the settings of `params[i]`."""

        def row_tensor(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            temperature=row_tensor([p.temperature for p in params], torch.float32),
            top_k=row_tensor([p.top_k for p in params], torch.int64),
            tail=row_tensor([1 - p.top_p for p in params], torch.float32),
            penalty=row_tensor([p.repetition_penalty for p in params], torch.float32),
            any_sampled=any(p.temperature > 0 for p in params),
        )


def uniform_noise(params: SamplingParams) -> Tensor:
    """A uniform number in [0, 1) for each token of a request: float32 [max_new_tokens], on the CPU.

    A larger `max_new_tokens` only appends numbers, so the answer starts the same.
    """
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return torch.rand(params.max_new_tokens, generator=generator)


def apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make repeated tokens less likely: positive scores are divided, negative ones multiplied.

    Args:
        scores: [rows, vocab] logits, or log-probabilities for beams (as in `transformers`).
        seen: bool [rows, vocab], the tokens to penalize. The original implementation penalizes
            generated tokens but not those of the prompt.
        penalty: float32 [rows].
    """
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def apply_token_masks(logits: Tensor, masks: Mapping[int, Tensor]) -> Tensor:
    """The logits [rows, vocab] with -inf for the tokens that a row's mask bool [vocab] excludes."""
    if masks:
        logits = logits.clone()
    for row, mask in masks.items():
        logits[row].masked_fill_(~mask.to(logits.device), -math.inf)
    return logits


def sample_tokens(logits: Tensor, settings: SamplingMetadata, noise: Tensor) -> Tensor:
    """The next token of each row: int64 [rows].

    Args:
        logits: [rows, vocab] of any float type, with at least one finite value in each row.
        settings: rows of temperature 0 take the most likely token (the first of a tie).
        noise: float32 [rows] in [0, 1), each request's `uniform_noise` for this step.
    """
    greedy = logits.argmax(dim=-1)
    if not settings.any_sampled:
        return greedy
    return torch.where(settings.temperature > 0, _sample(logits, settings, noise), greedy)


def _sample(logits: Tensor, settings: SamplingMetadata, noise: Tensor) -> Tensor:
    vocab = logits.shape[-1]
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    logits = logits.float()
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # <= 0: never overflows
    scores, ids = scores.sort(dim=-1)  # ascending, as top-p needs

    top_k = torch.where(settings.top_k > 0, settings.top_k.clamp(max=vocab), vocab)
    smallest_kept = scores.gather(-1, (vocab - top_k)[:, None])
    scores = scores.masked_fill(scores < smallest_kept, -math.inf)  # keeps ties with the k-th

    # Top-p cuts off the tail of the cumulative distribution, which leaves the interval
    # [floor, total); sampling uniformly from it needs no second normalization.
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    cut = (cumulative <= settings.tail[:, None]).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
    floor = torch.where(cut > 0, cumulative.gather(-1, (cut - 1).clamp(min=0)), 0.0)
    point = floor + noise[:, None] * (cumulative[:, -1:] - floor)
    sampled = torch.searchsorted(cumulative, point, right=True).clamp(max=vocab - 1)
    return ids.gather(-1, sampled)[:, 0]
