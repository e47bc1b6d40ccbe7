"""The thread that runs an `EngineCore`: its inbox, its health, and how it stops."""

import atexit
import logging
import threading
import time
from queue import Empty, SimpleQueue
from weakref import WeakSet

import torch

from xgenmm.engine.core import EngineCore
from xgenmm.engine.device import use_device
from xgenmm.engine.metrics import EngineStatus
from xgenmm.engine.request import EngineRequest
from xgenmm.errors import EngineError

logger = logging.getLogger(__name__)

EXIT_SECONDS = 10.0
"""Maximum time to wait for the current step when the interpreter exits."""

_RUNNING: "WeakSet[EngineThread]" = WeakSet()


@atexit.register
def _stop_all() -> None:
    """Stop all threads: one inside PyTorch when the interpreter exits would abort the process."""
    for thread in list(_RUNNING):
        thread.close(finish=False)
        thread.join(EXIT_SECONDS)


class EngineThread:
    """Runs an `EngineCore` in a separate thread. All methods may be called from any thread.

    The thread starts with the first request.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._inbox: SimpleQueue[EngineRequest | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="xgenmm-engine", daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._cancel_all = False
        self._failure: BaseException | None = None
        self._last_step = time.monotonic()
        _RUNNING.add(self)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises EngineError if the engine is shut down or broken."""
        with self._lock:
            self.check()
            if self._closed:
                raise EngineError("the engine is shut down; start it again")
            if self._thread.ident is None:
                self._thread.start()
            unfinished = self._core.output.unfinished
            if not unfinished:
                self._last_step = time.monotonic()
            unfinished.add(request)
            self._inbox.put(request)

    def check(self) -> None:
        """Raise EngineError if the thread has died, or has work but makes no step."""
        if self._failure is not None:
            raise EngineError(f"the engine stopped: {self._failure!r}; restart it")
        silent = time.monotonic() - self._last_step
        if silent > self._core.config.stall_seconds and self._core.output.unfinished:
            raise EngineError(f"the engine has made no step for {silent:.0f} s; restart it")

    def status(self) -> EngineStatus:
        """A snapshot; its numbers may come from successive steps."""
        core = self._core
        totals, blocks = core.metrics.totals, core.scheduler.blocks
        running = len(core.scheduler.running)
        return EngineStatus(
            running=running,
            waiting=max(0, len(core.output.unfinished) - running),
            free_blocks=blocks.num_free,
            num_blocks=blocks.num_blocks,
            preemptions=core.scheduler.num_preemptions,
            closed=self._closed,
            steps=totals["steps"],
            output_tokens=totals["output_tokens"],
            tiles_encoded=totals["tiles_encoded"],
            prompt_tokens=totals["prompt_tokens"],
            cached_tokens=totals["cached_tokens"],
            cached_blocks=blocks.num_cached,
            image_cache_bytes=core.runner.image_features.used_bytes,
            decode_path=core.runner.decode_path.name,
        )

    def close(self, *, finish: bool = True) -> None:
        """Refuse new requests. The thread stops when the accepted ones are finished.

        finish: False cancels the accepted requests.
        """
        with self._lock:
            self._closed = True
            self._cancel_all |= not finish
            self._inbox.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait, at most `timeout` seconds, until the thread has stopped."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            use_device(self._core.runner.model.device)
            while self._receive():
                self._last_step = time.monotonic()
                self._core.step(cancel_all=self._cancel_all)
        except BaseException as error:
            logger.exception("the engine stops")
            with self._lock:
                self._failure = error
            for request in self._core.output.unfinished:
                request.sink.end("failed", EngineError(f"the engine stopped: {error!r}"))

    def _receive(self) -> bool:
        """Take new requests, waiting for one if idle. Returns False if the thread should stop."""
        scheduler = self._core.scheduler
        while True:
            idle = scheduler.idle
            if idle and self._closed and self._inbox.empty():
                return False
            try:
                request = self._inbox.get(block=idle)
            except Empty:
                return True
            self._last_step = time.monotonic()
            if request is not None:
                if idle:
                    self._core.metrics.resume()
                scheduler.add(request)
