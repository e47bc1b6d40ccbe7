"""Logits in, tokens out: temperature, top-k, top-p, repetition penalty, beams, stop sequences.

Knows nothing of models or text encodings. `apply_repetition_penalty` and `sample_tokens` are pure
functions of tensors: a row a request, each row with its own settings, on whatever device the
logits are, with fixed shapes and without waiting for the device, as a CUDA graph needs it. A
constraint is applied by its owner before them, by setting the logits of forbidden tokens to -inf.

Randomness is an input: `uniform_noise` makes one uniform number for each token of one request, and
a token is read off the inverse cumulative distribution at that number. So the same request with the
same seed gives the same tokens whatever else is in the batch.

The results are those of `transformers` 4.41 (`generate` with the same settings): the filters of
`RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper` and
`TopPLogitsWarper` in this order, and the beams of `BeamSearchScorer`. Only the random numbers of
sampling differ.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from xgenmm.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingMetadata:
    """The settings of a batch as tensors [rows], a row a request, on the logits' device.

    A row may be overwritten in place when its request changes; `sampled` is then what it is for
    the whole batch: whether any row has a temperature above 0.
    """

    temperature: Tensor  # float32; 0 is greedy
    top_k: Tensor  # int64; 0 is off
    tail: Tensor  # float32, 1 - top_p: the probability that is cut off
    penalty: Tensor  # float32; 1 is off
    sampled: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str) -> "SamplingMetadata":
        """Row i takes the settings of `params[i]`."""

        def row_tensor(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            temperature=row_tensor([p.temperature for p in params], torch.float32),
            top_k=row_tensor([p.top_k for p in params], torch.int64),
            tail=row_tensor([1 - p.top_p for p in params], torch.float32),
            penalty=row_tensor([p.repetition_penalty for p in params], torch.float32),
            sampled=any(p.temperature > 0 for p in params),
        )


def uniform_noise(params: SamplingParams) -> Tensor:
    """Uniform numbers in [0, 1) for one request, one a token: float32 [max_new_tokens], on the CPU.

    A longer `max_new_tokens` continues the same numbers, so it continues the same answer.
    """
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return torch.rand(params.max_new_tokens, generator=generator)


def apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens that were seen less likely: positive scores are divided, negative multiplied.

    scores [rows, vocab] are logits, or log-probabilities for beams (as `transformers` does);
    seen [rows, vocab] bool marks the tokens of the history (the caller decides what that is:
    the original counts the generated tokens only); penalty [rows], see `SamplingMetadata`.
    """
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample_tokens(logits: Tensor, settings: SamplingMetadata, uniform: Tensor) -> Tensor:
    """The next token of each row: int64 [rows].

    logits [rows, vocab], of any float type, with at least one finite value a row; uniform [rows]
    float32 in [0, 1), this step's column of each request's `uniform_noise`. Rows of temperature 0
    take the most likely token (the first of equals).
    """
    greedy = logits.argmax(dim=-1)
    if not settings.sampled:
        return greedy
    return torch.where(settings.temperature > 0, _sample(logits, settings, uniform), greedy)


def _sample(logits: Tensor, settings: SamplingMetadata, uniform: Tensor) -> Tensor:
    vocab = logits.shape[-1]
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    logits = logits.float()
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # <= 0: never overflows
    scores, ids = scores.sort(dim=-1)  # ascending, as top-p needs

    top_k = torch.where(settings.top_k > 0, settings.top_k.clamp(max=vocab), vocab)
    smallest_kept = scores.gather(-1, (vocab - top_k)[:, None])
    scores = scores.masked_fill(scores < smallest_kept, -math.inf)  # ties with the k-th stay

    # Top-p cuts the tail of the cumulative distribution, so what is left is its upper interval
    # [floor, whole): a token drawn uniformly from that needs no second normalisation.
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    cut = (cumulative <= settings.tail[:, None]).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
    floor = torch.where(cut > 0, cumulative.gather(-1, (cut - 1).clamp(min=0)), 0.0)
    point = floor + uniform[:, None] * (cumulative[:, -1:] - floor)
    chosen = torch.searchsorted(cumulative, point, right=True).clamp(max=vocab - 1)
    return ids.gather(-1, chosen)[:, 0]


class BeamSearch:
    """The beam search of one request, without the model.

    Equals `generate(num_beams=num_beams, do_sample=False, early_stopping=False,
    length_penalty=1.0)` of `transformers` 4.41 from `inputs_embeds`: an answer's score is the sum
    of its log-probabilities divided by its length in tokens, its end token included, the prompt
    not. (Where several end ids are given, that release writes the first of them at the end; here
    it is the one that ended the answer.)

        search = BeamSearch(3, end_ids={32007}, max_new_tokens=256)
        parents, tokens = search.advance(log_probs_of_the_prefill)           # [1, vocab]
        while not search.finished:
            # row i takes over the cache of row parents[i] and is fed tokens[i]
            parents, tokens = search.advance(log_probs_of_a_decode_step)     # [num_beams, vocab]
        answer = search.best()
    """

    def __init__(self, num_beams: int, end_ids: Collection[int], max_new_tokens: int) -> None:
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.finished = False
        self._end_ids = frozenset(end_ids)
        self._length = 0
        self._running: list[tuple[float, list[int]]] = [(0.0, [])]  # summed log-probs, tokens
        self._ended: list[tuple[float, list[int]]] = []  # score, tokens

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """Take one step; returns the parent row and the token of each of the `num_beams` beams.

        log_probs [rows, vocab] float32, already penalised or constrained where wanted: one row
        for the first step, the `num_beams` rows of the last step afterwards. Waits for the device
        once.
        """
        self._length += 1
        parents: list[int] = []
        running: list[tuple[float, list[int]]] = []
        candidates = self._candidates(log_probs)
        for rank, (total, parent, token) in enumerate(candidates):
            tokens = [*self._running[parent][1], token]
            if token not in self._end_ids:
                parents.append(parent)
                running.append((total, tokens))
                if len(running) == self.num_beams:
                    break
            elif rank < self.num_beams:
                self._add(total, tokens)
        self._running = running
        # The best candidate bounds what is to come even where it has just ended. A tighter bound
        # stops earlier and now and then with another answer than the original.
        self._settle(bound=candidates[0][0] / self._length)
        return parents, [tokens[-1] for _, tokens in running]

    def best(self) -> list[int]:
        """The best answer's tokens, with its end token where it has one, once `finished`."""
        # Of equals the later one, as the original pops from a stable ascending sort.
        return sorted(self._ended, key=itemgetter(0))[-1][1]

    def _candidates(self, log_probs: Tensor) -> list[tuple[float, int, int]]:
        """The best continuations as (summed log-probs, parent row, token), the best first.

        Enough of them that `num_beams` go on even if all end tokens are among them.
        """
        vocab = log_probs.shape[-1]
        so_far = log_probs.new_tensor([total for total, _ in self._running])
        totals = (log_probs + so_far[:, None]).flatten()
        count = max(2, 1 + len(self._end_ids)) * self.num_beams
        values, places = totals.topk(min(count, totals.numel()))
        # float64 holds both exactly, so one copy brings both to the host.
        both = torch.stack((values.double(), places.double())).tolist()
        return [
            (total, int(place) // vocab, int(place) % vocab)
            for total, place in zip(*both, strict=True)
        ]

    def _settle(self, bound: float) -> None:
        """Finish where no running beam can score above `bound`, or at the greatest length."""
        worst = min((score for score, _ in self._ended), default=-math.inf)
        if len(self._ended) == self.num_beams and worst >= bound:
            self.finished = True
        elif self._length == self.max_new_tokens:
            for total, tokens in self._running:
                self._add(total, tokens)
            self.finished = True

    def _add(self, total: float, tokens: list[int]) -> None:
        """Keep an ended answer if it is among the `num_beams` best; of equals the first stays."""
        score = total / self._length
        if len(self._ended) == self.num_beams:
            worst = min(self._ended, key=itemgetter(0))
            if score <= worst[0]:
                return
            self._ended.remove(worst)
        self._ended.append((score, tokens))


class StopStringChecker:
    """Passes streamed text on until one of the stop sequences is complete.

    The stop sequence itself and all after it are dropped, wherever the pieces are cut. The one
    that is complete first counts, and the longest of those complete at the same character. Text
    that may still become a stop sequence is held back. The cost is linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held: deque[str] = deque()

    def push(self, text: str) -> str:
        """Take the next piece of text; returns the text that is now certain, which may be ""."""
        if self.stopped:
            return ""
        for character in text:
            self._held.append(character)
            complete = [len(m.stop) for m in self._matchers if m.completes(character)]
            if complete:
                self.stopped = True
                certain = self._take(len(self._held) - max(complete))
                self._held.clear()
                return certain
        return self._take(len(self._held) - max((m.matched for m in self._matchers), default=0))

    def flush(self) -> str:
        """The text still held back, at the end of the answer; "" after a stop."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        return "".join(self._held.popleft() for _ in range(count))


class _Matcher:
    """Knuth-Morris-Pratt: how much of the front of `stop` the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._shorter = [0] * len(stop)  # of stop[: i + 1]: its longest proper end that is a front
        length = 0
        for i in range(1, len(stop)):
            length = self._extended(length, stop[i])
            self._shorter[i] = length

    def completes(self, character: str) -> bool:
        """Take the next character; True when `stop` is complete, once."""
        self.matched = self._extended(self.matched, character)
        return self.matched == len(self.stop)

    def _extended(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._shorter[length - 1]
        return length + (self.stop[length] == character)
