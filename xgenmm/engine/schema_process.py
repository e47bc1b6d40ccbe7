"""Checks JSON schemas in a process of its own, which ends if one takes too much time or memory.

The process imports no torch, serves one check at a time and stays for the next. The kernel ends it
when a check exceeds its CPU time or memory, or overflows the stack; the next check starts another.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from xgenmm.engine.json_schema import (
    PARSER_LIMITS,
    SchemaLimits,
    cannot_enforce,
    enforceable,
    lark_grammar,
)
from xgenmm.errors import EngineError, InputError

STACK_BYTES = 8 << 20
"""Stack of a check. A thread with twice as much can compile what has passed it."""

NICENESS = 10
START_SECONDS = 60.0
CPU_SHARE = 0.05
"""Lowest share of a CPU that is assumed for the process."""


@dataclass(frozen=True)
class Vocabulary:
    """texts: bytes of each token, empty for special ones. end_ids: each may end an answer."""

    texts: Sequence[bytes]
    end_ids: Sequence[int]

    def tokenizer(self) -> LLTokenizer:
        """The vocabulary in llguidance's form."""
        wrapped = SimpleNamespace(
            tokens=self.texts, eos_token_id=self.end_ids[0], bos_token_id=None
        )
        return LLTokenizer(
            TokenizerWrapper(wrapped),
            eos_token=list(self.end_ids),
            slices=LLTokenizer.json_slices(),
        )


class CheckedSchema(NamedTuple):
    """grammar: for llguidance. refusal: why there is none; empty if there is one."""

    grammar: str = ""
    refusal: str = ""


class SchemaProcess:
    """The process, started with the first check. Thread-safe; checks wait for each other."""

    def __init__(self, vocabulary: Vocabulary, limits: SchemaLimits) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def check(self, text: str) -> CheckedSchema:
        """Check a schema, given as JSON. Raises EngineError if the process does not start."""
        with self._lock:
            connection = self._running()
            try:
                connection.send_bytes(text.encode())
                if not connection.poll(self._limits.seconds / CPU_SHARE):
                    raise EOFError
                return CheckedSchema(*json.loads(connection.recv_bytes()))
            except (EOFError, OSError):
                self._stop()
        return CheckedSchema(
            refusal=f"takes more than {self._limits.seconds:g} s or "
            f"{self._limits.memory >> 20} MB to check, or nests too deeply; make it simpler"
        )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _running(self) -> Connection:
        """The connection to the process, which is started if there is none."""
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._connection is not None:
            return self._connection
        connection, remote = Pipe()
        path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        with remote:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(remote.fileno())],
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._connection = connection
        self._end = weakref.finalize(self, _end, connection, self._process)
        try:
            connection.send((self._vocabulary, self._limits))
            if connection.poll(START_SECONDS):
                connection.recv_bytes()
                return connection
        except (EOFError, OSError):
            pass
        self._stop()
        raise EngineError("the process that checks JSON schemas does not start; see its output")

    def _stop(self) -> None:
        self._end()
        self._connection = self._process = None


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    process.kill()
    process.wait()


def _main(descriptor: int) -> None:
    """Run the process: answer each schema with a `CheckedSchema`, as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    connection = Connection(descriptor)
    vocabulary, limits = connection.recv()
    tokenizer = vocabulary.tokenizer()
    blank = sum(1 << i for i, text in enumerate(vocabulary.texts) if not text.strip())
    threading.stack_size(STACK_BYTES)
    sys.setrecursionlimit(10_000)  # jsonschema needs several frames for each level
    _limit_memory(limits.memory)
    connection.send_bytes(b"ready")

    def serve() -> None:
        with contextlib.suppress(EOFError):
            while True:
                text = connection.recv_bytes()
                signal.setitimer(signal.ITIMER_PROF, limits.seconds)
                checked = _check(text, tokenizer, ~blank, limits)
                signal.setitimer(signal.ITIMER_PROF, 0)
                connection.send_bytes(json.dumps(checked).encode())

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


def _limit_memory(growth: int) -> None:
    """Let the process allocate this many bytes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + STACK_BYTES + growth
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _check(
    text: bytes, tokenizer: LLTokenizer, visible: int, limits: SchemaLimits
) -> CheckedSchema:
    """visible: a bit for each token that is more than white space."""
    try:
        grammar = lark_grammar(enforceable(text, limits))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise cannot_enforce("$", f"it is too complex ({matcher.get_error()})")
        if not mask & visible:
            raise cannot_enforce("$", "no document conforms to it")
    except InputError as error:
        return CheckedSchema(refusal=str(error).removeprefix(f"{error.name}: "))
    except (AttributeError, TypeError, ValueError, RecursionError) as problem:
        return CheckedSchema(refusal=f"must be a JSON schema as an object ({problem})")
    return CheckedSchema(grammar)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
