"""The state of each row of the batch: newest token, its position and blocks, how to sample.

It consists of tensors of fixed shape on the model's device, so that a decode step can be captured
as a CUDA graph and needs the host only when a request is added, removed or takes a block.
"""

from collections.abc import Sequence

import torch

from xgenmm.config import BLOCK_SIZE, DecoderConfig
from xgenmm.engine.sampler import (
    SamplingMetadata,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.models.transfer import to_device

Rows = slice | torch.Tensor


class BatchState:
    """The state of all rows, as tensors on the model's device.

    token: int64 [rows], the newest token, whose keys and values are not cached yet.
    position: int64 [rows], where they go; -1 in rows that are not decoding.
    block_tables: int32 [rows, max_blocks].
    """

    def __init__(self, num_rows: int, config: DecoderConfig, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.vocab = config.initial_vocab + config.additional_tokens
        max_blocks = -(-config.max_positions // BLOCK_SIZE)
        self.token = zeros(num_rows)
        self.position = zeros(num_rows) - 1
        self.block_tables = zeros(num_rows, max_blocks, dtype=torch.int32)
        self._host_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32)
        self._tables: dict[int, list[int]] = {}
        self._sampling = zeros(num_rows)  # 1 in rows that sample a token at each step
        self._step = zeros(num_rows)  # tokens sampled so far
        self._seen = zeros(num_rows, self.vocab, dtype=torch.bool)
        # One more than an answer has tokens: a step may begin before the host sees the last one.
        max_steps = int(LIMITS["max_new_tokens"][1]) + 1
        self._noise = zeros(num_rows, max_steps, dtype=torch.float32)
        self._settings = SamplingMetadata.from_params([SamplingParams()] * num_rows, device)
        self._params: dict[int, SamplingParams] = {}

    def add(self, row: int, params: SamplingParams, output_token_ids: Sequence[int]) -> None:
        """Prepare a row for a request that has generated these tokens before a preemption."""
        self._params[row] = params
        self._step[row] = len(output_token_ids)
        if params.repetition_penalty != 1:
            self._seen[row] = False
            if output_token_ids:
                seen = torch.tensor(output_token_ids)
                self._seen[row, to_device(seen, self._seen.device)] = True
        if params.temperature > 0:
            noise = to_device(uniform_noise(params), self._noise.device)
            self._noise[row, : params.max_new_tokens] = noise
        # Assigning a number fills on the device; a tensor made of it would be copied there.
        batch = self._settings
        batch.temperature[row] = params.temperature
        batch.top_k[row] = params.top_k
        batch.tail[row] = 1 - params.top_p
        batch.penalty[row] = params.repetition_penalty

    def set_block_tables(self, tables: Sequence[tuple[int, list[int]]]) -> None:
        """Set the block tables of rows; what has not changed costs nothing."""
        changed = False
        for row, table in tables:
            if self._tables.get(row) != table:
                self._tables[row] = list(table)
                self._host_tables[row] = 0
                self._host_tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
                changed = True
        if changed:
            self.block_tables.copy_(to_device(self._host_tables, self.block_tables.device))

    def start(self, row: int, position: int) -> None:
        """Let the row sample a token at each step; `position` is that of its newest token."""
        self._sampling[row] = 1
        self.position[row] = position

    def remove(self, row: int) -> None:
        """Make the row idle.

        Decode steps may still run over idle rows, so their step must index valid noise.
        """
        self._params.pop(row, None)
        self._sampling[row] = self._step[row] = 0
        self.position[row] = -1

    def sample(self, rows: Rows, logits: torch.Tensor) -> torch.Tensor:
        """Sample the next token of these rows from logits [rows, vocab] and advance by it.

        Returns int64 [rows]; what is returned for rows that do not sample is meaningless.
        """
        batch = self._settings
        settings = SamplingMetadata(
            batch.temperature[rows],
            batch.top_k[rows],
            batch.tail[rows],
            batch.penalty[rows],
            any_sampled=any(params.temperature > 0 for params in self._params.values()),
        )
        noise = self._noise[rows].gather(1, self._step[rows][:, None])[:, 0]
        tokens = sample_tokens(self.penalize(rows, logits), settings, noise)
        sampling = self._sampling[rows]
        if self._penalizing:
            seen, sampled = self._seen[rows], tokens[:, None]
            self._seen[rows] = seen.scatter(
                1, sampled, seen.gather(1, sampled) | sampling[:, None].bool()
            )
        # Last, so that a step that fails before can be repeated.
        self.token[rows] = tokens
        self._step[rows] += sampling
        self.position[rows] += sampling
        return tokens

    def penalize(self, rows: Rows, scores: torch.Tensor) -> torch.Tensor:
        """Apply each row's repetition penalty to logits or log-probabilities [rows, vocab]."""
        if not self._penalizing:
            return scores
        return apply_repetition_penalty(scores, self._seen[rows], self._settings.penalty[rows])

    def reorder_beams(
        self, rows: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor, position: int
    ) -> None:
        """Let each row continue the beam of its parent row with a token at `position`."""
        self._seen[rows] = self._seen[parents].scatter(1, tokens[:, None], True)
        self.token[rows] = tokens
        self.position[rows] = position

    @property
    def _penalizing(self) -> bool:
        return any(params.repetition_penalty != 1 for params in self._params.values())
