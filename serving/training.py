"""`xgenmm finetune` as a process, for finetune.py: its progress as lines of a log, its faults."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving.inputs import POLL_SECONDS
from xgenmm import InputError
from xgenmm.errors import printable
from xgenmm.files import read_json_object
from xgenmm.finetuning.program import FAULT
from xgenmm.finetuning.progress import LOG, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
TETHER = ROOT / "serving" / "tether.py"
REPORT_SECONDS = 5.0
MAX_LINES = 40  # of what the check prints
MAX_FAULTS = 20
LINE_LENGTH = 300
MAX_OUTPUT = 1 << 20  # bytes read of what the process prints

logger = logging.getLogger(__name__)


class Training:
    """One run of `xgenmm finetune`; a CancelationException in `run` ends it.

    Attributes:
        adapter: the folder of the result.
    """

    def __init__(
        self, checkpoint: Path, data: Path, work: Path, options: Mapping[str, object]
    ) -> None:
        """Prepare a run.

        Args:
            data: the data file.
            work: an existing folder for all that the run writes.
            options: of the command, by name.
        """
        self._output, self._work = work / "output", work
        self.adapter = self._output / "adapter"
        self._stdout, self._stderr = work / "stdout", work / "stderr"
        self._hidden = f"{data.parent}/"
        self._command = [
            *(sys.executable, "-I", str(TETHER), sys.executable, "-u", "-m", "xgenmm"),
            *("finetune", str(checkpoint), str(data), "-o", str(self._output), "--untrusted"),
            *(str(part) for option in options.items() for part in option),
        ]
        self._read = 0  # bytes of the log
        self._reported, self._reported_step = 0.0, 0
        self._first: tuple[float, int] | None = None
        self._newest: dict[str, Any] = {}
        self._shown = False

    def run(self) -> dict[str, float]:
        """Check the dataset and train; return the figures of the last step.

        Raises InputError that names the first faults of the dataset, and RuntimeError if the
        process fails.
        """
        logger.info("checking the dataset")
        with (
            self._stdout.open("wb") as stdout,
            self._stderr.open("wb") as stderr,
            # In a session of its own, signals to the server's process group do not reach the
            # tether. The block's end closes its standard input, which ends the run, and waits.
            subprocess.Popen(
                self._command, cwd=ROOT, start_new_session=True,
                stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
            ) as process,
        ):  # fmt: skip
            while process.poll() is None:
                self._follow()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        if process.returncode:
            raise self._failure(process.returncode)
        self._follow(last=True)
        names = {"step": "steps", "loss": "loss", "validation_loss": "validation_loss"}
        return {name: self._newest[key] for key, name in names.items() if key in self._newest}

    def _follow(self, last: bool = False) -> None:
        """Log what is new, at most one line of steps in a few seconds, and the last step."""
        for line in self._new_lines():
            if not self._shown:
                self._shown = True
                self._show_report()
            self._newest |= line
            if "validation_loss" in line:
                logger.info("step %d: validation loss %.4f", line["step"], line["validation_loss"])
            elif self._first is None:
                self._first = time.monotonic(), line["step"]
        now = time.monotonic()
        is_new = self._newest.get("step", 0) > self._reported_step
        if is_new and (last or now - self._reported >= REPORT_SECONDS):
            self._reported, self._reported_step = now, self._newest["step"]
            logger.info("%s", self._progress(now))

    def _new_lines(self) -> list[dict[str, Any]]:
        file = self._output / LOG
        if not file.exists():
            return []
        with file.open("rb") as log:
            log.seek(self._read)
            whole = log.read().rpartition(b"\n")[0]
        self._read += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _show_report(self) -> None:
        """Log what the check has printed: counts, lengths and what would be cut."""
        lines = self._printed()
        for line in lines[:MAX_LINES]:
            logger.info("%s", line[:LINE_LENGTH])

    def _printed(self) -> list[str]:
        with self._stdout.open("rb") as file:
            text = file.read(MAX_OUTPUT).decode(errors="replace")
        return text.replace(self._hidden, "").splitlines()

    def _progress(self, now: float) -> str:
        settings = read_json_object(self._output / SETTINGS)
        steps = -(-settings["samples"] // settings["batch_size"]) * settings["epochs"]
        line = self._newest
        text = f"step {line['step']} of {steps}"
        if "loss" in line:  # a step without anything to learn has none
            text += f", loss {line['loss']:.4f}"
        text += f", rate {line['rate']:.1e}"
        assert self._first is not None
        began, first = self._first
        if line["step"] > first:
            left = (now - began) / (line["step"] - first) * (steps - line["step"])
            text += f", {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left"
        return text

    def _failure(self, status: int) -> Exception:
        """What went wrong, by what the process has printed."""
        lines = self._printed()
        faults = [line.removeprefix(FAULT) for line in lines if line.startswith(FAULT)]
        if faults:
            shown = [printable(fault, LINE_LENGTH) for fault in faults[:MAX_FAULTS]]
            more = ["..."] * (len(faults) > len(shown))
            cut = " or more" * (self._stdout.stat().st_size > MAX_OUTPUT)
            head = f"{len(faults)}{cut} faults, so nothing was trained:"
            return InputError("dataset", "\n".join([head, *shown, *more]))
        with self._stderr.open("rb") as file:
            file.seek(max(0, self._stderr.stat().st_size - MAX_OUTPUT))
            errors = file.read().decode(errors="replace").replace(self._hidden, "").splitlines()
        reason = printable(next((e for e in reversed(errors) if e.strip()), ""), LINE_LENGTH)
        if reason.startswith("error: "):
            return RuntimeError(f"the training failed: {reason.removeprefix('error: ')}")
        killed = " (killed, perhaps because the memory was full)" if status == 137 else ""
        return RuntimeError(f"the training failed with status {status}{killed}: {reason}")
