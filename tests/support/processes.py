"""Processes that run `xgenmm` and can be killed, forked from one that has imported it already."""

import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["xgenmm.finetuning.program", "peft", "accelerate"])


def start(
    arguments: Sequence[str],
    output: Path,
    environment: Mapping[str, str] | None = None,
    max_file_bytes: int | None = None,
) -> BaseProcess:
    """Start `xgenmm ARGUMENTS`, computing in one thread.

    output: file that gets what the process writes to stdout and stderr.
    max_file_bytes: above which the process cannot write, as on a full disk.
    """
    process = _CONTEXT.Process(
        target=_run, args=(arguments, output, dict(environment or {}), max_file_bytes)
    )
    process.start()
    return process


def start_group(
    arguments: Sequence[str], output: Path, count: int = 2
) -> tuple[TCPStore, list[BaseProcess]]:
    """Start processes that find one another as those of `torchrun` do, through the store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environments = [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
    return store, [start(arguments, output, environment) for environment in environments]


def _run(
    arguments: Sequence[str], output: Path, environment: dict[str, str], max_bytes: int | None
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    import torch

    from xgenmm.__main__ import main

    torch.set_num_threads(1)
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    sys.exit(main(arguments))
