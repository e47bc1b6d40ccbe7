"""The choice of a device, and that every thread of an engine uses it. No GPU is needed."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import xgenmm
from tests.support import tiny
from xgenmm import InputError, Request, SamplingParams
from xgenmm.engine import engine_thread, load
from xgenmm.engine.device import resolve_device, use_device

SECOND_GPU = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports two GPUs, the second of which is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """cuDNN's attention is enabled, and as before afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


class DeviceUses:
    """Stands in for `use_device`: records the device of each thread."""

    def __init__(self) -> None:
        self.by_thread: dict[int, torch.device] = {}

    def __call__(self, device: torch.device) -> None:
        self.by_thread[threading.get_ident()] = device


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("wanted", "resolved"),
    [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")],
)
def test_gpu_has_an_index(wanted: str | None, resolved: str) -> None:
    assert resolve_device(wanted) == torch.device(resolved)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cuda:2", "cuda:2 does not exist; use cuda:0 to cuda:1"),
        ("mps", "mps is not supported; use cpu, cuda or cuda:N"),
        ("gpu", "'gpu' is not a device; use cpu, cuda or cuda:N"),
    ],
)
def test_device_that_does_not_exist_is_rejected(wanted: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^device: {message}$"):
        resolve_device(wanted)


@pytest.mark.usefixtures("cudnn_attention")
def test_gpu_becomes_the_current_one_and_cudnn_attention_is_disabled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    use_device(torch.device("cpu"))
    assert current == []
    assert torch.backends.cuda.cudnn_sdp_enabled()
    use_device(SECOND_GPU)
    assert current == [SECOND_GPU]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_loading_and_engine_thread_use_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = DeviceUses()
    monkeypatch.setattr(load, "use_device", uses)
    monkeypatch.setattr(engine_thread, "use_device", uses)
    engine = xgenmm.load(tiny.checkpoint(tmp_path), device="cpu", max_num_seqs=1)
    assert set(uses.by_thread) == {threading.get_ident()}
    engine.stream(Request("Hi", sampling=SamplingParams(max_new_tokens=1))).text()
    engine.close()
    assert len(uses.by_thread) == 2


def test_kernels_are_compiled_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    uses, compiled_in = DeviceUses(), list[int]()

    def compile_kernels(*_: Any) -> None:
        compiled_in.append(threading.get_ident())

    monkeypatch.setattr(load, "resolve_device", lambda wanted: SECOND_GPU)
    monkeypatch.setattr(load, "use_device", uses)
    monkeypatch.setattr(load, "compile_kernels", compile_kernels)
    monkeypatch.setattr(load, "load_parameters", lambda *args, **options: None)
    monkeypatch.setattr(load, "Engine", lambda *args, **options: SimpleNamespace(num_blocks=1))
    load.load("demo", device="cuda:1")
    (thread,) = compiled_in
    assert thread != threading.get_ident()
    assert uses.by_thread[thread] == SECOND_GPU
