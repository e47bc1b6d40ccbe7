"""The part `soak` on a tiny model."""

from pathlib import Path

import torch

import xgenmm
from scripts.benchmarks.random_data import TINY_CONFIG, write_checkpoint
from scripts.benchmarks.soak import run_soak


def test_soak_loses_and_leaks_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY_CONFIG, torch.device("cpu"), torch.float32)
    engine = xgenmm.load(tmp_path, max_num_seqs=4, cache_bytes=2 << 20)
    result = run_soak(engine, 150, seed=1)
    assert result.unexpected == []
    assert result.outcomes.total() == 150
    assert result.outcomes.keys() >= {"refused", "end", "length", "cancelled"}
    assert result.leaked == 0
    assert result.growth < 1.05
