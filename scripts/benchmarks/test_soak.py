"""Random requests, good and bad, read, cancelled and left: nothing leaks, nothing is lost."""

from pathlib import Path

import xgenmm
from scripts.benchmarks.__main__ import run_soak
from tests.support import tiny


def test_soak(tmp_path: Path) -> None:
    engine = xgenmm.load(tiny.checkpoint(tmp_path), max_num_seqs=4, cache_bytes=2 << 20)
    done = run_soak(engine, 150, seed=1)
    assert done.unexpected == []
    assert done.outcomes.total() == 150
    assert done.outcomes.keys() >= {"refused", "end", "length", "cancelled"}
    assert done.leaked == 0
    assert done.growth < 1.05
