"""The state of each batch slot: newest token, its position, and how to sample the next token.

It consists of tensors of fixed shape on the model's device, so that a decode step can be captured
as a CUDA graph and needs the host only when a request is added or removed.
"""

import torch

from xgenmm.engine.sampler import (
    SamplingMetadata,
    apply_repetition_penalty,
    sample_tokens,
    uniform_noise,
)
from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.models.transfer import to_device


class BatchState:
    """The sampling state of all slots, as tensors [slots] on the model's device.

    token: int64, the newest token, whose keys and values are not cached yet.
    position: int64, where they go.
    """

    def __init__(self, num_slots: int, vocab: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token = zeros(num_slots)
        self.position = zeros(num_slots)
        self._active = zeros(num_slots)  # 1 in slots that sample a token at each step
        self._step = zeros(num_slots)  # tokens sampled so far
        self._seen = zeros(num_slots, vocab, dtype=torch.bool)
        # One more than an answer has tokens: a step may begin before the host sees the last one.
        max_steps = int(LIMITS["max_new_tokens"][1]) + 1
        self._noise = zeros(num_slots, max_steps, dtype=torch.float32)
        self._settings = SamplingMetadata.from_params([SamplingParams()] * num_slots, device)
        self._params: dict[int, SamplingParams] = {}

    def add_request(self, slot: int, params: SamplingParams, num_computed_tokens: int) -> None:
        """Prepare a slot for a request with `num_computed_tokens` tokens in the KV cache."""
        self._params[slot] = params
        self.position[slot] = num_computed_tokens
        if params.repetition_penalty != 1:
            self._seen[slot] = False
        if params.temperature > 0:
            noise = to_device(uniform_noise(params), self._noise.device)
            self._noise[slot, : params.max_new_tokens] = noise
        # Assigning a number fills on the device; a tensor made of it would be copied there.
        batch = self._settings
        batch.temperature[slot] = params.temperature
        batch.top_k[slot] = params.top_k
        batch.tail[slot] = 1 - params.top_p
        batch.penalty[slot] = params.repetition_penalty

    def activate(self, slot: int) -> None:
        """Let the slot sample a token at each step from now on."""
        self._active[slot] = 1

    def remove(self, slot: int) -> None:
        """Make the slot idle.

        Decode steps still run over idle slots, so their step must index valid noise.
        """
        self._params.pop(slot, None)
        self._active[slot] = self.position[slot] = self._step[slot] = 0

    def sample(self, slots: slice | torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Sample the next token of these slots from logits [slots, vocab]: int64 [slots].

        The tokens of inactive slots are meaningless.
        """
        batch = self._settings
        settings = SamplingMetadata(
            batch.temperature[slots],
            batch.top_k[slots],
            batch.tail[slots],
            batch.penalty[slots],
            any_sampled=any(params.temperature > 0 for params in self._params.values()),
        )
        noise = self._noise[slots].gather(1, self._step[slots][:, None])[:, 0]
        tokens = sample_tokens(self.penalize(slots, logits), settings, noise)
        if self._penalizing:
            seen, sampled = self._seen[slots], tokens[:, None]
            marked = seen.gather(1, sampled) | self._active[slots, None].bool()
            self._seen[slots] = seen.scatter(1, sampled, marked)
        self.token[slots] = tokens
        self._step[slots] += self._active[slots]
        return tokens

    def advance(self, slots: slice) -> None:
        """Move active slots to the next position, after their newest tokens were computed."""
        self.position[slots] += self._active[slots]

    def penalize(self, slots: slice | torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply each slot's repetition penalty to logits or log-probabilities [slots, vocab]."""
        if not self._penalizing:
            return scores
        return apply_repetition_penalty(scores, self._seen[slots], self._settings.penalty[slots])

    def reorder_beams(
        self, slots: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor, position: int
    ) -> None:
        """Let each slot continue the beam of its parent slot with a token at `position`."""
        self._seen[slots] = self._seen[parents].scatter(1, tokens[:, None], True)
        self.token[slots] = tokens
        self.position[slots] = position

    @property
    def _penalizing(self) -> bool:
        return any(params.repetition_penalty != 1 for params in self._params.values())
