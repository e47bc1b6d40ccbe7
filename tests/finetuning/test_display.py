"""Progress: a bar on a terminal, plain lines in the log of a server."""

import logging
import os
import re
import sys
import termios

import pytest

from xgenmm.finetuning.display import Progress


def test_without_a_terminal_progress_is_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(300, "step", initial=297) as progress:
        for loss in ("1.234", "1.111", "1.000"):
            progress.update(loss=loss, rate="9.1e-05")
    first, last = caplog.messages  # ten seconds have not passed between the first and the second
    assert re.fullmatch(r"step 298 of 300: loss 1.234, rate 9.1e-05, \S+ s a step, 0 s left", first)
    assert last.startswith("step 300 of 300: loss 1.000, ")


def test_on_a_terminal_progress_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 120))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(3, "step") as progress:
            progress.update(loss="1.234")
        shown = ""
        while "loss" not in shown:  # a terminal hands on what is written piece by piece
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    assert re.search(r"33%.*1/3 \[.*<.*, loss=1.234\]", shown)
    assert caplog.messages == []
