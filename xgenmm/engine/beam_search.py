"""Beam search on log-probabilities."""

import math
from collections.abc import Collection
from operator import itemgetter

import torch
from torch import Tensor


class BeamSearch:
    """The beam search of one request, without the model.

    Equals `generate(num_beams=num_beams, do_sample=False, early_stopping=False,
    length_penalty=1.0)` of `transformers` 4.41 from `inputs_embeds`: the score of an answer is the
    sum of its log-probabilities divided by its length in tokens, with its end token and without the
    prompt. One difference: given several end ids, that release replaces an answer's end token with
    the first of them.

        search = BeamSearch(3, end_ids={32007}, max_tokens=256)
        parents, tokens = search.advance(prefill_log_probs)         # [1, vocab]
        while not search.finished:
            # beam i continues the cached beam parents[i] with tokens[i]
            parents, tokens = search.advance(decode_log_probs)      # [num_beams, vocab]
        answer = search.best()
    """

    def __init__(self, num_beams: int, end_ids: Collection[int], max_tokens: int) -> None:
        self.num_beams = num_beams
        self.max_tokens = max_tokens
        self.finished = False
        self._end_ids = frozenset(end_ids)
        self._length = 0
        self._running: list[tuple[float, list[int]]] = [(0.0, [])]  # summed log-probs, tokens
        self._ended: list[tuple[float, list[int]]] = []  # score, tokens

    def advance(self, log_probs: Tensor) -> tuple[list[int], list[int]]:
        """Advance by one token; returns the parent and the token of each of the `num_beams` beams.

        log_probs: float32 [rows, vocab], penalized if wanted; one row for the first step and
            `num_beams` rows afterwards. Waits for the device once.
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
        # The best candidate is the bound even if it has just ended, as in `transformers`. A tighter
        # bound stops earlier, sometimes with a different answer.
        self._finish_if_done(bound=candidates[0][0] / self._length)
        return parents, [tokens[-1] for _, tokens in running]

    def best(self) -> list[int]:
        """Token ids of the best answer, with its end token if it has one. Needs `finished`."""
        # The last one of a tie, since `transformers` pops from a stable ascending sort.
        return sorted(self._ended, key=itemgetter(0))[-1][1]

    def _candidates(self, log_probs: Tensor) -> list[tuple[float, int, int]]:
        """The best continuations as (summed log-probs, parent row, token), best first.

        Enough to continue `num_beams` beams even if every end token is among them.
        """
        vocab = log_probs.shape[-1]
        previous = log_probs.new_tensor([total for total, _ in self._running])
        totals = (log_probs + previous[:, None]).flatten()
        count = max(2, 1 + len(self._end_ids)) * self.num_beams
        values, indices = totals.topk(min(count, totals.numel()))
        # float64 holds both exactly, so one copy to the host is enough.
        both = torch.stack((values.double(), indices.double())).tolist()
        return [
            (total, int(index) // vocab, int(index) % vocab)
            for total, index in zip(*both, strict=True)
        ]

    def _finish_if_done(self, bound: float) -> None:
        """Finish if no running beam can score above `bound`, or at `max_tokens`."""
        worst = min((score for score, _ in self._ended), default=-math.inf)
        if len(self._ended) == self.num_beams and worst >= bound:
            self.finished = True
        elif self._length == self.max_tokens:
            for total, tokens in self._running:
                self._add(total, tokens)
            self.finished = True

    def _add(self, total: float, tokens: list[int]) -> None:
        """Keep an answer if it is among the `num_beams` best; in a tie, the first one stays."""
        score = total / self._length
        if len(self._ended) == self.num_beams:
            worst = min(self._ended, key=itemgetter(0))
            if score <= worst[0]:
                return
            self._ended.remove(worst)
        self._ended.append((score, tokens))
