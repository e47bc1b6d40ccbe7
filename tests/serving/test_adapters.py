"""The engine of predict.py while requests change its adapter."""

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import xgenmm
from serving.adapters import AdapterEngine
from serving.compat import Prediction
from tests.support import adapters, tiny
from xgenmm import CheckpointError, Engine, EngineError, InputError
from xgenmm.checkpoints.adapter import read_adapter
from xgenmm.preprocessing.fetch import FetchLimits


class FakeEngine:
    def __init__(self, adapter: bytes) -> None:
        self.adapter, self.closed = adapter, False

    def check(self) -> None:
        if self.closed:
            raise EngineError("closed")

    def close(self) -> None:
        self.closed = True


class Loader:
    """Loads fake engines; `failures` says how many loads fail from now on."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.failures = 0
        self.while_loading: Callable[[], object] = lambda: None
        self.served = AdapterEngine(cast(Any, self.load), self.check)

    def load(self, adapter: Path | None) -> FakeEngine:
        self.while_loading()
        if self.failures:
            self.failures -= 1
            raise EngineError(f"{adapter} takes too much memory")
        assert all(engine.closed for engine in self.engines), "two engines at once"
        self.engines.append(FakeEngine(adapter.read_bytes() if adapter else b""))
        return self.engines[-1]

    def check(self, adapter: Path) -> None:
        if adapter.read_bytes() == b"wrong":
            raise CheckpointError(f"adapter: {adapter} is for another checkpoint")


@pytest.fixture
def loader() -> Loader:
    """A loader whose first engine is loaded."""
    loader = Loader()
    loader.served.start("", FetchLimits())
    return loader


async def asked(loader: Loader, adapter: bytes | None) -> bytes:
    """The adapter with which a prediction runs, from its start to its end."""
    with Prediction() as prediction:
        return cast(Any, await loader.served.acquire(prediction, adapter)).adapter


def test_adapters_take_turns(loader: Loader) -> None:
    async def ask() -> list[bytes]:
        return [await asked(loader, adapter) for adapter in (None, b"a", b"a", b"b", None, None)]

    assert asyncio.run(ask()) == [b"", b"a", b"a", b"b", b"", b""]
    assert [engine.adapter for engine in loader.engines] == [b"", b"a", b"b", b""]


def test_default_adapter_may_be_sent_too(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"a")
    loader = Loader()
    loader.served.start(str(tmp_path / "a.tar"), FetchLimits())
    assert asyncio.run(asked(loader, b"a")) == asyncio.run(asked(loader, None)) == b"a"
    assert len(loader.engines) == 1


def test_default_adapter_comes_from_a_url() -> None:
    loader = Loader()
    loader.served.start("data:,a", FetchLimits())
    assert asyncio.run(asked(loader, b"a")) == asyncio.run(asked(loader, None)) == b"a"


def test_another_adapter_is_refused_while_predictions_run(loader: Loader) -> None:
    async def ask() -> None:
        with Prediction() as prediction:
            await loader.served.acquire(prediction, b"a")
            assert await asked(loader, b"a") == b"a"
            for other in (b"b", None):
                with pytest.raises(InputError, match=r"^adapter: 1 predictions with another"):
                    await asked(loader, other)
        assert await asked(loader, b"b") == b"b"

    asyncio.run(ask())


def test_prediction_that_is_dropped_does_not_keep_its_adapter(loader: Loader) -> None:
    async def ask() -> None:
        prediction = Prediction()
        await loader.served.acquire(prediction, b"a")
        del prediction
        assert await asked(loader, b"b") == b"b"

    asyncio.run(ask())


def test_wrong_adapter_changes_nothing(loader: Loader) -> None:
    with pytest.raises(InputError, match=r"^adapter: adapter\.tar is for another checkpoint$"):
        asyncio.run(asked(loader, b"wrong"))
    assert asyncio.run(asked(loader, None)) == b""
    assert len(loader.engines) == 1


def test_what_was_loaded_is_restored_if_an_adapter_cannot_be_loaded(loader: Loader) -> None:
    assert asyncio.run(asked(loader, b"a")) == b"a"
    loader.failures = 1
    with pytest.raises(InputError, match=r"^adapter: adapter\.tar takes too much memory$"):
        asyncio.run(asked(loader, b"b"))
    loader.served.check()
    assert loader.engines[-1].adapter == b"a"
    assert asyncio.run(asked(loader, b"a")) == b"a"
    assert len(loader.engines) == 3


def test_server_is_unhealthy_until_a_load_succeeds(loader: Loader) -> None:
    loader.failures = 2
    with pytest.raises(EngineError, match="too much memory"):
        asyncio.run(asked(loader, b"a"))
    with pytest.raises(EngineError, match="could not be loaded again"):
        loader.served.check()
    assert asyncio.run(asked(loader, None)) == b""
    loader.served.check()


def test_server_is_healthy_while_an_adapter_is_loaded(loader: Loader) -> None:
    loader.while_loading = loader.served.check
    assert asyncio.run(asked(loader, b"a")) == b"a"


def test_cancelled_prediction_lets_the_loading_end(loader: Loader) -> None:
    async def ask() -> None:
        loop, started = asyncio.get_running_loop(), asyncio.Event()
        loader.while_loading = lambda: loop.call_soon_threadsafe(started.set)
        task = asyncio.create_task(asked(loader, b"a"))
        await started.wait()
        task.cancel()
        assert await asked(loader, b"a") == b"a"
        assert await asked(loader, b"b") == b"b"

    asyncio.run(ask())
    assert [engine.adapter for engine in loader.engines] == [b"", b"a", b"b"]


def test_real_engine_is_replaced_and_freed(tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    tar = adapters.pack(tmp_path / "a.tar", adapters.write(tmp_path / "a", base))
    engines: list[weakref.ref[Engine]] = []

    def load(adapter: Path | None) -> Engine:
        assert all(engine() is None for engine in engines), "the old engine is still there"
        made = xgenmm.load(base, "cpu", adapter=adapter)
        engines.append(weakref.ref(made))
        return made

    served = AdapterEngine(load, lambda adapter: read_adapter(adapter, base))
    served.start("", FetchLimits())

    async def answer(adapter: bytes | None) -> str:
        with Prediction() as prediction:
            engine = await served.acquire(prediction, adapter)
            sampling = xgenmm.SamplingParams(max_new_tokens=8)
            return engine.stream(xgenmm.Request("What is this?", sampling=sampling)).text()

    before, trained = (asyncio.run(answer(a)) for a in (None, tar.read_bytes()))
    assert trained != before
    assert asyncio.run(answer(None)) == before
    assert len(engines) == 3
    served.close()
