"""The state of each row of the cache that decodes: newest token, its place, how to draw the next.

All of it tensors on the model's device with fixed shapes, so that a decode step can be captured as
a CUDA graph and needs the host only where a request joins or leaves.
"""

import torch

from xgenmm.engine.sampler import (
    SamplingMetadata,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import LIMITS, SamplingParams


class BatchState:
    """What each row of the cache is about to do, as tensors on the model's device."""

    def __init__(self, count: int, vocab: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token = zeros(count)  # the newest, not yet in the cache
        self.position = zeros(count)  # where it goes
        self._active = zeros(count)  # 1 in rows whose own token is drawn at each step
        self._step = zeros(count)
        self._seen = zeros(count, vocab, dtype=torch.bool)
        # One more than an answer's tokens: a step may begin before the last one is seen.
        most = int(LIMITS["max_new_tokens"][1]) + 1
        self._uniform = zeros(count, most, dtype=torch.float32)
        self._settings = SamplingMetadata.of([SamplingParams()] * count, device)
        self._params: dict[int, SamplingParams] = {}

    def join(self, row: int, params: SamplingParams, length: int) -> None:
        """A row begins, `length` positions in the cache."""
        self._params[row] = params
        self.position[row] = length
        self._step[row] = 0
        if params.repetition_penalty != 1:
            self._seen[row] = False
        if params.temperature > 0:
            self._uniform[row, : params.max_new_tokens] = uniform_noise(params).to(
                self.token.device
            )
        one, all_rows = SamplingMetadata.of([params], self.token.device), self._settings
        for name in ("temperature", "top_k", "tail", "penalty"):
            getattr(all_rows, name)[row] = getattr(one, name)[0]

    def start(self, row: int) -> None:
        """From now on the row draws a token of its own at each step."""
        self._active[row] = 1

    def leave(self, row: int) -> None:
        """The row is idle."""
        self._params.pop(row, None)
        self._active[row] = self.position[row] = 0

    def draw(self, rows: slice | torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next token of these rows: int64 [rows]; only active rows' are to be used."""
        every = self._settings
        settings = SamplingMetadata(
            every.temperature[rows],
            every.top_k[rows],
            every.tail[rows],
            every.penalty[rows],
            sampled=any(params.temperature > 0 for params in self._params.values()),
        )
        uniform = self._uniform[rows].gather(1, self._step[rows][:, None])[:, 0]
        tokens = sample_tokens(self.penalised(rows, logits), settings, uniform)
        if self._penalising:
            seen, drawn = self._seen[rows], tokens[:, None]
            own = seen.gather(1, drawn) | self._active[rows, None].bool()
            self._seen[rows] = seen.scatter(1, drawn, own)
        self.token[rows] = tokens
        self._step[rows] += self._active[rows]
        return tokens

    def advance(self, rows: slice) -> None:
        """The newest tokens of these rows are in the cache now."""
        self.position[rows] += self._active[rows]

    def penalised(self, rows: slice | torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Logits or log-probabilities with each row's repetition penalty."""
        if not self._penalising:
            return logits
        return apply_repetition_penalty(logits, self._seen[rows], self._settings.penalty[rows])

    def follow(self, rows: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Beams: each row takes over the history of its parent's, and a token."""
        self._seen[rows] = self._seen[parents].scatter(1, tokens[:, None], True)
        self.token[rows] = tokens

    @property
    def _penalising(self) -> bool:
        return any(params.repetition_penalty != 1 for params in self._params.values())
