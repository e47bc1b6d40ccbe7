"""The engine of predict.py with one adapter at a time, which a request may change.

An adapter is merged into the weights when they are loaded, so another one means to load the
checkpoint again. That happens while no other prediction runs; else the request is refused.
"""

import asyncio
import gc
import hashlib
import logging
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from serving.compat import Prediction, temporary_folder
from serving.inputs import read_url
from xgenmm import CheckpointError, Engine, EngineError, InputError
from xgenmm.errors import printable
from xgenmm.preprocessing.fetch import FetchLimits

FILE = "adapter.tar"

logger = logging.getLogger(__name__)


class AdapterEngine:
    """Loads the engine with an adapter, and again with another.

    Requests without an adapter mean the default one, that of the server's settings.
    """

    def __init__(
        self, load: Callable[[Path | None], Engine], check: Callable[[Path], object]
    ) -> None:
        """Prepare; `start` loads the first engine.

        Args:
            load: loads the checkpoint with an adapter, or with none.
            check: raises CheckpointError if an adapter is not for the checkpoint.
        """
        self._load, self._check = load, check
        self._folder = temporary_folder("adapter")
        self._engine: Engine | None = None
        self._default: tuple[str, Path | None] = ("none", None)
        self._loaded: tuple[str, Path | None] = self._default
        self._users: set[object] = set()
        self._lock = asyncio.Lock()
        self._switching = False

    def start(self, adapter: str, limits: FetchLimits) -> Engine:
        """Load the engine with the default adapter.

        adapter: a folder, a tar, the URL of a tar, or empty for none.

        Raises InputError if it cannot be fetched, and as `load` does.
        """
        if adapter.startswith(("http://", "https://", "data:")):
            content = read_url("adapter", adapter, limits, "archive")
            self._default = self._write(content)
        elif adapter:
            path = Path(adapter).expanduser()
            self._default = _digest(path), path
        self._loaded = self._default
        self._engine = self._load(self._default[1])
        return self._engine

    def check(self) -> None:
        """Raise EngineError, with the reason, if the engine does not work."""
        engine = self._engine
        if self._switching:
            return
        if engine is None:
            raise EngineError("the checkpoint could not be loaded again after a failure")
        engine.check()

    def close(self) -> None:
        """Finish the requests and stop."""
        if self._engine is not None:
            self._engine.close()

    async def acquire(self, prediction: Prediction, adapter: bytes | None) -> Engine:
        """Return the engine with an adapter; it stays loaded until the prediction ends.

        adapter: the file of the request; None for the default.

        Raises InputError if other predictions use another adapter, if the adapter is not for this
        checkpoint, or if it cannot be loaded; what was loaded before then stays or is restored.
        """
        digest = self._default[0]
        if adapter is not None:
            digest = (await asyncio.to_thread(hashlib.sha256, adapter)).hexdigest()
        # A cancelled prediction does not stop the loading, for which others may wait, too.
        return await asyncio.shield(self._acquire(prediction, digest, adapter))

    async def _acquire(self, prediction: Prediction, digest: str, adapter: bytes | None) -> Engine:
        async with self._lock:
            if digest != self._loaded[0] or self._engine is None:
                if self._users:
                    raise InputError(
                        "adapter",
                        f"{len(self._users)} predictions with another adapter are running; send "
                        "the request again when they have ended, or to a server of its own that "
                        "has the adapter as XGENMM_ADAPTER",
                    )
                await asyncio.to_thread(self._switch, adapter)
            user = object()
            self._users.add(user)
            prediction.at_end(self._users.discard, user)
            assert self._engine is not None
            return self._engine

    def _switch(self, adapter: bytes | None) -> None:
        before = self._loaded
        after = self._default if adapter is None else self._write(adapter)
        try:
            if adapter is not None and after[1] is not None:
                self._check(after[1])
        except CheckpointError as error:
            self._remove_except(before)
            raise _input_error(error, after[1]) from error
        self._switching = True
        try:
            self._replace(after)
        except Exception as error:  # of memory, of the GPU, ...
            logger.exception("the adapter cannot be loaded")
            if self._engine is None and before != after:
                self._replace(before)
            raise _input_error(error, after[1]) from error
        finally:
            self._switching = False
            self._remove_except(self._loaded)

    def _replace(self, adapter: tuple[str, Path | None]) -> None:
        """Load the checkpoint with another adapter, once the memory of the old one is free."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        still_used = weakref.ref(engine) if engine is not None else lambda: None
        del engine
        gc.collect()
        if still_used() is not None:
            logger.warning("the memory of the engine before cannot be freed")
        torch.cuda.empty_cache()
        self._engine = self._load(adapter[1])
        self._loaded = adapter

    def _write(self, content: bytes) -> tuple[str, Path]:
        """Write the file of an adapter; return its digest and path."""
        digest = hashlib.sha256(content).hexdigest()
        folder = self._folder / digest
        folder.mkdir(exist_ok=True)
        (folder / FILE).write_bytes(content)
        return digest, folder / FILE

    def _remove_except(self, loaded: tuple[str, Path | None]) -> None:
        for folder in self._folder.iterdir():
            if folder.name not in (loaded[0], self._default[0]):
                shutil.rmtree(folder, ignore_errors=True)


def _digest(path: Path) -> str:
    """The sha256 of a tar, by which a request may mean it; a folder has none."""
    if not path.is_file():
        return "default"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _input_error(error: Exception, path: Path | None) -> InputError:
    """Name the input `adapter`, and not the temporary file."""
    text = str(error) or type(error).__name__
    if path is not None:
        text = text.replace(f"{path.parent}/", "")
    return InputError("adapter", printable(text.removeprefix("adapter: "), 500))
