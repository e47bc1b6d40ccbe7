"""The self check with planted faults, in Triton's interpreter; run by `test_triton_kernels.py`.

The model is float32, but the check allows what rounding to bfloat16 may cause: a fault must be
larger. A newest key that is forgotten only where many keys are visible is not: the attention tests
of `interpreted_kernels.py` cover that.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError

from tests.kernels.interpreted_kernels import tiny_model
from tests.kernels.test_triton_kernels import TINY
from xgenmm.config import BLOCK_SIZE
from xgenmm.errors import EngineError
from xgenmm.kernels import decode_step, self_check, triton_attention
from xgenmm.kernels.cuda_graphs import Capture, DecodePath, build_decode_step
from xgenmm.models.kv_cache import KVCache

ROWS = 2


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of bfloat16, and few programs, since each takes the interpreter milliseconds."""
    monkeypatch.setitem(self_check.LIMITS, torch.float32, self_check.LIMITS[torch.bfloat16])
    monkeypatch.setattr(decode_step, "PROGRAMS", 4)
    monkeypatch.setattr(decode_step, "FEW_ROWS", 0)


def same_memory(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Instead of a CUDA graph."""
    return function


class Engine:
    """What an engine has of a decode step: the batch, the cache and the path that serves."""

    def __init__(self) -> None:
        max_blocks = TINY.max_positions // BLOCK_SIZE
        self.model = tiny_model()
        self.cache = self.model.cache(24)
        self.tokens = torch.zeros(ROWS, dtype=torch.int64)
        self.positions = torch.full_like(self.tokens, -1)
        self.block_tables = torch.zeros(ROWS, max_blocks, dtype=torch.int32)

    def build(self, mode: Any = "auto", capture: Capture = same_memory) -> DecodePath:
        batch = (self.tokens, self.positions, self.block_tables)
        return build_decode_step(self.model, self.cache, *batch, mode, capture)

    def is_unused(self) -> bool:
        nothing = not self.cache.keys.any() and not self.cache.values.any()
        return nothing and not self.block_tables.any() and bool((self.positions == -1).all())


def test_kernels_serve_after_a_check_of_every_batch_size() -> None:
    engine = Engine()
    path = engine.build()
    assert path.name == "kernels"
    assert path.check is not None
    assert [batch.rows for batch in path.check.batches] == [1, 2]
    assert all(0 < max(batch.logits, batch.cache) < 1e-5 for batch in path.check.batches)
    assert path.reason == str(path.check)
    assert engine.is_unused()
    engine.positions[0] = 0
    engine.block_tables[0, 0] = 3
    assert path.decode is not None
    expected = engine.model.decode(
        engine.tokens[:1], engine.positions[:1], engine.block_tables[:1], engine.cache
    )
    torch.testing.assert_close(path.decode(1), expected, rtol=0, atol=1e-5)


def changed_kernel(folder: Path, old: str, new: str) -> Any:
    """The attention kernel with one line changed."""
    source = Path(triton_attention.__file__).read_text()
    assert source.count(old) == 1
    file = folder / "changed_attention.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("changed_attention", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("(offset == end % BLOCK)", "(offset < 0)", "logits differ", id="newest key"),
        pytest.param(
            "position + 1 - WINDOW", "position + 2 - WINDOW", "logits differ", id="window"
        ),
        pytest.param("position + 1 - WINDOW", "position - WINDOW", "logits differ", id="one more"),
        pytest.param("new_key.to(", "q.to(", "keys and values differ", id="stored key"),
        pytest.param("tl.float32) * scale", "tl.float32)", "logits differ", id="beside prompts"),
        pytest.param("end_block = tl.minimum(", "end_block = minimum(", "minimum", id="compile"),
    ],
)
def test_faulty_kernel_is_not_used(
    old: str,
    new: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decode_step, "triton_attention", changed_kernel(tmp_path, old, new))
    engine = Engine()
    path = engine.build()
    assert (path.name, path.decode) == ("plain", None)
    assert message in path.reason
    assert engine.is_unused()
    [record] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert path.reason in record.getMessage()
    assert "report" in record.getMessage()


def test_stale_block_table_is_not_used() -> None:
    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        assert isinstance(function, partial)
        tokens, positions, block_tables = function.args
        return partial(function.func, tokens, positions, block_tables.clone())

    path = Engine().build(capture=capture)
    assert path.name == "plain"
    assert "in batches of 1, logits differ" in path.reason


@pytest.mark.parametrize("bad_row", [0, 1])
def test_nan_in_one_row_is_not_used(bad_row: int) -> None:
    def capture(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            logits = function()
            logits[bad_row:, 5] = torch.nan
            return logits

        return step

    path = Engine().build(capture=capture)
    assert path.name == "plain"
    assert f"in batches of {1 + bad_row}, logits differ" in path.reason


@pytest.mark.parametrize(
    "error",
    [
        CompilationError("", None, None),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
    ],
    ids=["compile", "no compiler", "launch"],
)
def test_failed_compilation_or_launch_falls_back_unless_kernels_are_required(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(triton_attention, "launch", launch)
    engine = Engine()
    path = engine.build()
    assert path.name == "plain"
    assert str(error) in path.reason
    assert engine.is_unused()
    with pytest.raises(EngineError, match="the decode kernels failed"):
        engine.build("kernels")


def test_plain_path_runs_no_kernel() -> None:
    def capture(_: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise AssertionError

    assert Engine().build("plain", capture).name == "plain"


def test_check_fits_the_smallest_cache_of_an_engine() -> None:
    """Rows for which the cache has no blocks are padding."""
    engine = Engine()
    engine.cache = KVCache.allocate(
        TINY, TINY.max_positions // BLOCK_SIZE + 2, device=engine.model.device, dtype=torch.float32
    )
    assert engine.build().name == "kernels"
