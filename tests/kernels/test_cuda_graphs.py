"""Bucketing and static inputs of the decode graphs, with a call in the place of a capture."""

from collections.abc import Callable

import pytest
import torch

from xgenmm.kernels.cuda_graphs import CudaGraphRunner

CPU = torch.device("cpu")


class Recorder:
    """A step that tells what it saw, and a capture that always repeats the step on its memory."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.seen: list[tuple[list[int], list[int]]] = []

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.seen.append((tokens.tolist(), positions.tolist()))
        return (tokens * 10 + positions)[:, None].float()

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captured.append(len(function()))
        self.seen.clear()
        return function


def graphs(most_rows: int) -> tuple[Recorder, CudaGraphRunner]:
    recorder = Recorder()
    return recorder, CudaGraphRunner(recorder.step, most_rows, CPU, recorder.capture)


@pytest.mark.parametrize(
    ("most_rows", "buckets"), [(1, [1]), (5, [8, 4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1])]
)
def test_only_the_buckets_that_are_needed_are_captured(most_rows: int, buckets: list[int]) -> None:
    assert graphs(most_rows)[0].captured == buckets


def test_capturing_touches_no_row() -> None:
    positions = []

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        positions.append(function().flatten().unique().tolist())
        return function

    CudaGraphRunner(lambda tokens, places: places[:, None].float(), 4, CPU, capture)
    assert positions == [[-1.0]] * 3


def test_rows_fill_the_smallest_bucket_and_the_rest_are_no_rows() -> None:
    recorder, captured = graphs(8)
    captured.decode(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 8, 9, 10, 11]))
    logits = captured.decode(torch.tensor([6, 7, 8]), torch.tensor([3, 2, 1]))
    assert logits.flatten().tolist() == [63, 72, 81]
    tokens, positions = recorder.seen[-1]
    assert tokens[:3] == [6, 7, 8]
    assert positions == [3, 2, 1, -1]


def test_more_rows_than_captured_are_refused() -> None:
    _, captured = graphs(3)
    nothing = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 asked for, 1 to 4 were captured"):
        captured.decode(nothing, nothing)
    with pytest.raises(ValueError, match="65 are more than the largest bucket, 64"):
        graphs(65)
