"""How the engine's thread stops when the process exits."""

import subprocess
import sys
from pathlib import Path

from tests.support import tiny


def test_program_may_exit_while_answers_are_generated(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path)
    program = f"""
import xgenmm
engine = xgenmm.load({str(folder)!r}, device="cpu")
sampling = xgenmm.SamplingParams(max_new_tokens=2000)
questions = [xgenmm.Request(f"Number {{i}}?", sampling=sampling) for i in range(16)]
answers = [engine.stream(question) for question in questions]
print(next(iter(answers[0])), engine.status().running > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["True"]), done.stderr
