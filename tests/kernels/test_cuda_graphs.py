"""Buckets and static inputs of `CudaGraphRunner`, with plain calls instead of CUDA graphs."""

import gc
from collections.abc import Callable

import pytest
import torch

from xgenmm.kernels.cuda_graphs import CudaGraphRunner

CPU = torch.device("cpu")


class Recorder:
    """A decode step that records its inputs, and a capture that calls the step again."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.inputs: list[tuple[list[int], list[int]]] = []

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.inputs.append((tokens.tolist(), positions.tolist()))
        return (tokens * 10 + positions)[:, None].float()

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captured.append(len(function()))
        self.inputs.clear()
        return function


def graphs(max_rows: int) -> tuple[Recorder, CudaGraphRunner]:
    recorder = Recorder()
    return recorder, CudaGraphRunner(recorder.step, max_rows, CPU, recorder.capture)


@pytest.mark.parametrize(
    ("max_rows", "buckets"), [(1, [1]), (5, [8, 4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1])]
)
def test_only_needed_buckets_are_captured(max_rows: int, buckets: list[int]) -> None:
    assert graphs(max_rows)[0].captured == buckets


def test_capture_runs_on_padding_only() -> None:
    captured_positions = []

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        captured_positions.append(function().flatten().unique().tolist())
        return function

    CudaGraphRunner(lambda tokens, positions: positions[:, None].float(), 4, CPU, capture)
    assert captured_positions == [[-1.0]] * 3


def test_no_garbage_is_collected_during_capture() -> None:
    collecting = []

    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        collecting.append(gc.isenabled())
        return function

    CudaGraphRunner(lambda tokens, positions: tokens[:, None].float(), 2, CPU, capture)
    assert collecting == [False, False]
    assert gc.isenabled()


def test_batch_is_padded_to_the_smallest_bucket() -> None:
    recorder, runner = graphs(8)
    runner.decode(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 8, 9, 10, 11]))
    logits = runner.decode(torch.tensor([6, 7, 8]), torch.tensor([3, 2, 1]))
    assert logits.flatten().tolist() == [63, 72, 81]
    tokens, positions = recorder.inputs[-1]
    assert tokens[:3] == [6, 7, 8]
    assert positions == [3, 2, 1, -1]


def test_too_many_rows_are_rejected() -> None:
    _, runner = graphs(3)
    nothing = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 is not between 1 and 4"):
        runner.decode(nothing, nothing)
    with pytest.raises(ValueError, match="65 exceeds the largest bucket, 64"):
        graphs(65)
