"""What a run leaves on the disk while it trains, so that it can be killed at any moment.

OUTPUT holds `settings.json`, `log.jsonl` (a line for each step and each validation), `downloads`
(the images of URLs) and `state/step-N`, the newest complete state: trained parameters, optimizer
and schedule. Its files hold whole tensors, so another number of devices may continue. `state/best`
has the trained parameters of the lowest validation loss, in an adapter's files.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from xgenmm.checkpoints.staging import disk_errors
from xgenmm.errors import InputError
from xgenmm.files import atomic_write, read_json_object, sync, write_json
from xgenmm.finetuning.adapters import save_tensors, trained_tensors
from xgenmm.finetuning.module import TrainedModel
from xgenmm.finetuning.sharding import gather, like
from xgenmm.finetuning.step import Stepper

SETTINGS, LOG, STATE, DOWNLOADS = "settings.json", "log.jsonl", "state", "downloads"
_WEIGHTS, _MOMENTS, _REST = "trained.safetensors", "optimizer.safetensors", "state.json"


class RunFolder:
    """The folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / STATE / "best"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, or check that a run with the same settings began in it.

        Raises InputError, naming the settings that differ.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / SETTINGS
        if not file.exists():
            if any(path.name != DOWNLOADS for path in self.path.iterdir()):
                raise InputError("output", f"{self.path} has other files; give a new folder")
            write_json(file, settings)
        found = read_json_object(file)
        wanted = json.loads(json.dumps(settings))
        different = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
        if different:
            names = ", ".join(f"{k} ({found.get(k)} then, {wanted.get(k)} now)" for k in different)
            problem = f"{self.path} has a run with other settings: {names}; give a new folder"
            raise InputError("output", problem)

    def save(
        self, step: int, module: TrainedModel, stepper: Stepper, extra: Any, *, writes: bool
    ) -> None:
        """Save the state after `step` steps; the one before is removed once this is complete.

        All processes call this, and one `writes`. Raises CheckpointError if the disk is full; the
        state before stays.
        """
        weights = gather(trained_tensors(module), keep=writes)
        moments = gather(stepper.moments(), keep=writes)
        if not writes:
            return
        with complete_folder(self.path / STATE / f"step-{step:08}") as folder:
            save_tensors(folder / _WEIGHTS, weights)
            save_tensors(folder / _MOMENTS, moments)
            write_json(folder / _REST, {"counters": stepper.counters(), "extra": extra})
        for old in self._states()[:-1]:
            shutil.rmtree(old)

    def load(self, module: TrainedModel, stepper: Stepper) -> tuple[int, Any]:
        """Load the newest state; return how many steps it has made, and `extra`.

        Returns (0, None) if there is none.
        """
        states = self._states()
        if not states:
            return 0, None
        folder = states[-1]
        tensors, rest = load_file(folder / _WEIGHTS), read_json_object(folder / _REST)
        with torch.no_grad():
            for name, parameter in trained_tensors(module).items():
                parameter.copy_(like(parameter, tensors[name]))
        stepper.load(load_file(folder / _MOMENTS), rest["counters"])
        return int(folder.name.removeprefix("step-")), rest["extra"]

    def _states(self) -> list[Path]:
        return sorted((self.path / STATE).glob("step-*[0-9]"))

    def truncate_log(self, step: int) -> None:
        """Remove the lines of steps that were made after the newest state, or cut short."""
        file = self.path / LOG
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        with atomic_write(file) as out:
            out.write("".join(line + "\n" for line in kept).encode())

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line, without NaN: JSON has none, and a step without labels no loss."""
        line = {key: value for key, value in line.items() if value == value}
        with disk_errors(self.path / LOG), (self.path / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Return all lines."""
        return [json.loads(line) for line in (self.path / LOG).read_text().splitlines()]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # killed while it was written
        return float("inf")


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `target`, in its place, when the block ends.

    After a kill, `target` is the old folder or the new one. Raises CheckpointError if the disk is
    full.
    """
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        with disk_errors(target):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
