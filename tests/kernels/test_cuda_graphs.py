"""Buckets and static inputs of `CudaGraphRunner`, with plain calls instead of CUDA graphs."""

import gc
from collections.abc import Callable

import pytest
import torch

from xgenmm.kernels.cuda_graphs import CudaGraphRunner, needed_buckets


class Batch:
    """Batch tensors, a step that records its positions, and a capture that calls it again."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.positions = torch.full_like(self.tokens, -1)
        self.block_tables = torch.zeros(rows, 2, dtype=torch.int32)
        self.captured: list[int] = []
        self.decoded: list[list[int]] = []
        self.collecting_garbage: list[bool] = []
        self.runner = CudaGraphRunner(
            self.step, self.tokens, self.positions, self.block_tables, self.capture
        )

    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, block_tables: torch.Tensor
    ) -> torch.Tensor:
        self.decoded.append(positions.tolist())
        return (tokens * 100 + positions * 10 + block_tables[:, 1])[:, None].float()

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captured.append(len(function()))
        self.decoded.clear()
        self.collecting_garbage.append(gc.isenabled())
        return function


@pytest.mark.parametrize(
    ("rows", "buckets"), [(1, [1]), (8, [8, 4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1])]
)
def test_only_needed_buckets_are_captured(rows: int, buckets: list[int]) -> None:
    assert Batch(rows).captured == buckets


def test_no_garbage_is_collected_during_capture() -> None:
    assert Batch(2).collecting_garbage == [False, False]
    assert gc.isenabled()


def test_smallest_bucket_that_fits_reads_the_state_of_the_batch() -> None:
    batch = Batch(8)
    batch.tokens[:3] = torch.tensor([6, 7, 8])
    batch.positions[:3] = torch.tensor([3, 2, 1])
    batch.block_tables[:3, 1] = torch.tensor([4, 5, 6])
    assert batch.runner.decode(3).flatten().tolist() == [634, 725, 816]
    batch.positions[2] = -1
    batch.runner.decode(2)
    assert batch.decoded == [[3, 2, 1, -1], [3, 2]]


def test_wrong_numbers_of_rows_are_rejected() -> None:
    batch = Batch(4)
    with pytest.raises(ValueError, match="5 is not between 1 and 4"):
        batch.runner.decode(5)
    with pytest.raises(ValueError, match="0 is not between 1 and 4"):
        batch.runner.decode(0)
    with pytest.raises(ValueError, match="6 is not one of the buckets"):
        Batch(6)
    with pytest.raises(ValueError, match="257 exceeds the largest bucket, 256"):
        needed_buckets(257)
