"""The state of batch rows."""

import torch

from xgenmm.config import BLOCK_SIZE, DecoderConfig
from xgenmm.engine.batch_state import BatchState
from xgenmm.engine.sampling_params import LIMITS, SamplingParams

VOCAB = 6
CONFIG = DecoderConfig(initial_vocab=VOCAB - 1, additional_tokens=1, max_positions=3 * BLOCK_SIZE)
ROWS = 3


def batch_with(*rows: tuple[int, SamplingParams, int]) -> BatchState:
    """Rows that sample, each with its settings and the position of its newest token."""
    batch = BatchState(ROWS, CONFIG, torch.device("cpu"))
    for row, params, position in rows:
        batch.add(row, params, [])
        batch.start(row, position)
    return batch


def sample(batch: BatchState, *rows: int, steps: int = 1) -> list[list[int]]:
    """The tokens of these rows at each step, from logits that favor no token by much."""
    logits = torch.linspace(0, 0.5, VOCAB).repeat(len(rows), 1)
    return [batch.sample(torch.tensor(rows), logits).tolist() for _ in range(steps)]


def test_only_sampling_rows_advance() -> None:
    batch = batch_with((0, SamplingParams(), 4), (2, SamplingParams(), 7))
    batch.add(1, SamplingParams(num_beams=2), [])
    sample(batch, 0, 1, 2, steps=2)
    assert batch.position.tolist() == [6, -1, 9]
    assert batch.token[[0, 2]].tolist() == [VOCAB - 1] * 2
    batch.remove(0)
    sample(batch, 0, 1, 2)
    assert batch.position.tolist() == [-1, -1, 10]


def test_rows_can_be_sampled_in_any_order_and_as_a_slice() -> None:
    batch = batch_with((0, SamplingParams(), 0), (2, SamplingParams(), 0))
    logits = torch.eye(VOCAB)
    assert batch.sample(torch.tensor([2, 0]), logits[[4, 1]]).tolist() == [4, 1]
    assert batch.token[[0, 2]].tolist() == [1, 4]
    assert batch.sample(slice(3), logits[:3])[[0, 2]].tolist() == [0, 2]


def test_tokens_do_not_depend_on_other_rows() -> None:
    params = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.5)
    alone = sample(batch_with((0, params, 0)), 0, steps=20)
    other = SamplingParams(temperature=2.0, seed=6)
    batch = batch_with((0, other, 0), (1, params, 0), (2, SamplingParams(), 0))
    assert [tokens[1:2] for tokens in sample(batch, 0, 1, 2, steps=20)] == alone
    assert len({token for (token,) in alone}) > 2


def test_row_continues_after_a_preemption_as_if_nothing_had_happened() -> None:
    params = SamplingParams(temperature=1.0, seed=5, repetition_penalty=3.0)
    expected = sample(batch_with((0, params, 10)), 0, steps=30)
    batch = batch_with((0, params, 10))
    begun = sample(batch, 0, steps=12)
    batch.remove(0)
    other = SamplingParams(temperature=1.0, seed=6, repetition_penalty=2.0)
    batch.add(0, other, [])  # another request in the meantime
    batch.start(0, 3)
    sample(batch, 0, steps=5)
    batch.remove(0)
    batch.add(1, params, [token for (token,) in begun])
    batch.start(1, 21)
    assert begun + sample(batch, 1, steps=18) == expected
    assert batch.position.tolist() == [-1, 39, -1]


def test_generated_tokens_are_penalized() -> None:
    batch = batch_with((0, SamplingParams(repetition_penalty=2.0), 0), (1, SamplingParams(), 0))
    logits = torch.tensor([[1.0, 1.5, 0, 0, 0, 0]]).repeat(2, 1)
    tokens = [batch.sample(torch.tensor([0, 1]), logits).tolist() for _ in range(3)]
    assert tokens == [[1, 1], [0, 1], [1, 1]]
    scores = batch.penalize(torch.tensor([1, 0]), -torch.ones(2, VOCAB))
    assert scores.tolist() == [[-1] * VOCAB, [-2, -2, -1, -1, -1, -1]]
    batch.remove(0)
    batch.add(0, SamplingParams(repetition_penalty=2.0), [])  # of another request: nothing seen
    assert batch.penalize(torch.tensor([0]), -torch.ones(1, VOCAB)).tolist() == [[-1] * VOCAB]


def test_beams_continue_the_rows_of_their_parents() -> None:
    batch = BatchState(ROWS, CONFIG, torch.device("cpu"))
    rows = torch.arange(ROWS)
    for row in range(ROWS):
        batch.add(row, SamplingParams(num_beams=3, repetition_penalty=2.0), [])
    batch.reorder_beams(rows, torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]), 10)
    batch.reorder_beams(rows, torch.tensor([2, 0, 0]), torch.tensor([4, 5, 1]), 11)
    assert batch.token.tolist() == [4, 5, 1]
    assert batch.position.tolist() == [11] * 3
    penalized = batch.penalize(rows, -torch.ones(ROWS, VOCAB)) < -1
    assert [row.nonzero().flatten().tolist() for row in penalized] == [[3, 4], [1, 5], [1]]


def test_block_tables_end_with_the_padding_block() -> None:
    batch = BatchState(ROWS, CONFIG, torch.device("cpu"))
    table = [5, 3, 8]
    batch.set_block_tables([(0, table), (2, [7])])
    assert batch.block_tables.tolist() == [[5, 3, 8], [0, 0, 0], [7, 0, 0]]
    table[1:] = [4]  # the scheduler changes tables in place
    batch.set_block_tables([(0, table)])
    assert batch.block_tables.tolist() == [[5, 4, 0], [0, 0, 0], [7, 0, 0]]


def test_idle_row_can_be_sampled_after_an_answer_of_maximum_length() -> None:
    """Decode steps also sample idle rows, which must not read beyond the end of their noise."""
    limit = int(LIMITS["max_new_tokens"][1])
    batch = batch_with((0, SamplingParams(limit, temperature=1.0, seed=1), 5))
    logits = torch.zeros(ROWS, VOCAB)
    for _ in range(limit + 1):  # one more than the answer, as with overlapped steps
        batch.sample(slice(ROWS), logits)
    assert batch.position.tolist() == [5 + limit + 1, -1, -1]
    batch.remove(0)
    assert batch.position.tolist() == [-1] * ROWS
    batch.sample(slice(ROWS), logits)
