"""The devices of a run, a process each, as `accelerate launch` or `torchrun` started them."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch

from xgenmm.errors import InputError
from xgenmm.finetuning.module import TrainedModel
from xgenmm.finetuning.sharding import shard
from xgenmm.finetuning.step import Batch


class Devices:
    """This process's device, and those of the processes beside it.

    Attributes:
        device: where this process computes.
        count, index: of the processes, and which of them this is.
        is_main: whether this process writes files.
        sharded: whether the model is split over the devices.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        """Join the other processes.

        sharded: split the model over the devices, instead of a copy on each.

        Raises InputError if accelerate is not installed, or was told to split the model itself.
        """
        for other in ("FSDP", "DEEPSPEED"):
            if os.environ.get(f"ACCELERATE_USE_{other}", "false").lower() == "true":
                problem = f"leave {other} out of accelerate's configuration, and use --shard"
                raise InputError("finetune", problem)
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            problem = "needs accelerate; run `pip install 'xgenmm[finetune]'`"
            raise InputError("finetune", problem) from error
        # One process checks the data, and writes the result, while the others wait.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # or processes would not know of one another
            mixed_precision="no",  # see TrainedModel; not what an environment variable says
            kwargs_handlers=[patience],
        )
        self.device: torch.device = self._accelerator.device
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process
        self.sharded = sharded and self.count > 1
        self._wrapped: Any = None  # DDP, or the module

    def wrap(self, module: TrainedModel) -> Callable[[Batch], torch.Tensor]:
        """Return what computes the loss so that gradients are averaged over the devices."""
        module.all_parts = self.count > 1
        if self.sharded:
            shard(module, self.device, self.count)
            self._wrapped = module
        else:
            self._wrapped = self._accelerator.prepare(module)
        return self._wrapped

    def unsynchronized(self) -> AbstractContextManager[Any]:
        """In this context gradients of copies stay on their device, to be averaged later.

        Those of shards are averaged at once: whole gradients take too much memory.
        """
        if self.sharded or self.count == 1:
            return nullcontext()
        return self._wrapped.no_sync()

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Add up numbers over all devices."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        values = torch.tensor(numbers, dtype=dtype, device=self.device)
        total: list[float] = self._accelerator.reduce(values, "sum").tolist()
        return total

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Take leave of the other processes."""
        self._accelerator.end_training()
