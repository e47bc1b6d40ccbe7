"""Ctrl-C while an address hangs: how long the program takes to leave, and what it has written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.hostile.files import write_images
from scripts.hostile.runner import Case, Outcome, last_line, read_rows

LEAVE_SECONDS = 20.0  # mostly for Python to unload PyTorch on a busy machine
GOOD = 6
RAY_GOOD, RAY_ANSWERED = 32, 18  # Ray answers a block only when all its images are there


def interrupt_outcomes(folder: Path, port: int, seconds: float) -> Iterator[Outcome]:
    """Interrupt a run for each way of hanging, alone and on Ray, and continue one of them."""
    names = ["no answer", "headers drip", "body drips", "100 Continue, slowly", "chunks drip"]
    for name in names:
        yield _interrupt(folder / name, name, port, seconds, ray=False)
    for name in names[:2]:
        yield _interrupt(folder / f"{name} ray", name, port, seconds, ray=True)


def _interrupt(folder: Path, name: str, port: int, seconds: float, *, ray: bool) -> Outcome:
    case = Case("Ctrl-C", f"{name}{' with Ray' * ray}", lambda _: [])
    good, answered = (RAY_GOOD, RAY_ANSWERED) if ray else (GOOD, GOOD)
    write_images(folder, good)
    sources = [f"{number}.png" for number in range(good)]
    sources += [f"http://127.0.0.1:{port}/{name}?{number}" for number in range(3)]
    lines = [json.dumps({"image": source}) + "\n" for source in sources]
    (folder / "t.jsonl").write_text("".join(lines))
    command = [sys.executable, "-m", "xgenmm", "caption", str(folder / "t.jsonl")]
    command += ["-o", str(folder / "out"), "--max-new-tokens", "2"]
    command += ["--ray", "local", "--actors", "1"] if ray else []
    with (folder / "log").open("wb") as log:
        environment = os.environ | {"TQDM_MININTERVAL": "0"}  # show each row at once
        process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
    started = time.monotonic()
    while f" {answered}/{len(sources)} " not in (folder / "log").read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() - started > seconds:
            process.kill()
            return Outcome(case, "the good images were not answered", seconds, 0, folder)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    elapsed = time.monotonic() - interrupted
    log_text = (folder / "log").read_text(errors="replace")
    if "Traceback" in log_text or "Fatal" in log_text:
        problem = "traceback: " + last_line(log_text)[:200]
    elif elapsed > LEAVE_SECONDS:
        problem = f"leaves after {elapsed:.1f} s"
    elif process.returncode != 130:
        problem = f"status {process.returncode}"
    else:
        rows = len(read_rows(folder / "out"))
        problem = "" if rows == answered else f"{rows} rows on the disk, not {answered}"
    return Outcome(case, problem, elapsed, 0, folder)
