"""The sampling state of batch slots."""

import torch

from xgenmm.engine.batch_state import BatchState
from xgenmm.engine.sampling_params import LIMITS, SamplingParams


def test_idle_slot_can_be_sampled_after_an_answer_of_maximum_length() -> None:
    """Decode steps also sample idle slots, which must not read beyond the end of their noise."""
    limit = int(LIMITS["max_new_tokens"][1])
    batch, slots = BatchState(2, 4, torch.device("cpu")), slice(2)
    batch.add_request(0, SamplingParams(limit, temperature=1.0, seed=1), 5)
    batch.activate(0)
    logits = torch.zeros(2, 4)
    for _ in range(limit + 1):  # one more than the answer, as with overlapped steps
        batch.sample(slots, logits)
        batch.advance(slots)
    assert batch.position.tolist() == [5 + limit + 1, 0]
    batch.remove(0)
    assert batch.position.tolist() == [0, 0]
    batch.sample(slots, logits)
