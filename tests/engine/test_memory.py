"""How much memory an engine takes, and how many requests fit it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.engine_requests import engine_request
from xgenmm.config import INTERLEAVE, RELEASES
from xgenmm.engine import memory
from xgenmm.engine.block_manager import BlockManager
from xgenmm.engine.lru_cache import LRUCache
from xgenmm.engine.memory import cache_budget, split_budget
from xgenmm.engine.scheduler import Scheduler, SchedulerConfig
from xgenmm.errors import InputError
from xgenmm.models.xgenmm import XGenMM

GB = 10**9


@pytest.fixture(scope="module")
def model() -> XGenMM:
    """The released model's sizes, without weights."""
    with torch.device("meta"):
        return XGenMM(RELEASES[INTERLEAVE]).bfloat16()


def test_requests_take_the_memory_of_their_tokens(model: XGenMM) -> None:
    """A row of the whole context for each request held 21 of them in 34 GB."""
    config = model.config.decoder
    row_bytes = 2 * config.num_layers * config.hidden_size * 2 * (config.max_positions + 1)
    num_blocks, image_bytes = split_budget(model, 21 * row_bytes)
    assert 0 < image_bytes < 0.1 * 21 * row_bytes
    blocks = BlockManager(num_blocks)
    scheduler = Scheduler(256, blocks, LRUCache(0), SchedulerConfig(10**6, 10**6))
    for _ in range(128):
        scheduler.add(engine_request(900))
    scheduler.schedule()
    assert len(scheduler.running) >= 4 * 21


def test_a_cache_too_small_for_one_request_is_refused(model: XGenMM) -> None:
    with pytest.raises(InputError, match=r"^cache_bytes: .* positions, fewer than the 4096"):
        split_budget(model, GB)
    num_blocks, _ = split_budget(model, 2 * GB)
    assert num_blocks * 32 >= 4096


def test_gpu_budget_leaves_the_workspace_and_the_share_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = list[str]()

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        calls.append("mem_get_info")
        return 60 * GB, 80 * GB

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(memory, "workspace_bytes", lambda model, tokens: 2 * GB)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda:1"))
    assert cache_budget(on_gpu, 0.9, 2048) == 50 * GB
    assert calls == ["empty_cache", "mem_get_info"]  # what PyTorch holds in reserve is free


def test_cpu_budget_holds_one_request(model: XGenMM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 3 * GB)
    on_cpu: Any = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, config=model.config
    )
    num_blocks, _ = split_budget(on_cpu, cache_budget(on_cpu, 0.9, 512))
    assert 4096 <= num_blocks * 32 < 4096 + 64
