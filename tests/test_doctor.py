"""The command `xgenmm doctor`."""

from pathlib import Path

import pytest
import torch

from tests.support import tiny
from xgenmm.__main__ import main
from xgenmm.engine import prefill_check
from xgenmm.models.attention import Segment, prompt_segment


def test_doctor_shows_the_machine_and_checks_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(tiny.checkpoint(tmp_path)), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for line in ("torch 2.", " cores, memory ", "checkpoints: demo", "weights in "):
        assert line in shown
    assert "prefill: logits differ from the reference's by " in shown
    assert "the same as the reference's" in shown
    assert "tokens/s by the plain path" in shown
    assert shown.endswith("all checks passed\n")


def test_doctor_names_a_checkpoint_that_cannot_be_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "no-such-model"]) == 1
    shown = capsys.readouterr().out
    assert "no-such-model" in shown
    assert shown.endswith("something is wrong\n")


def test_doctor_detects_a_wrong_prefill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_key_fewer(
        start: int, length: int, table: torch.Tensor, window: int, dtype: torch.dtype
    ) -> Segment:
        return prompt_segment(start, length, table, window - 1, dtype)

    monkeypatch.setattr(prefill_check, "prompt_segment", one_key_fewer)
    assert main(["doctor", str(tiny.checkpoint(tmp_path)), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "prefill: the logits after a prompt differ from the reference's by" in shown
    assert "- prefill failed; report all of the above" in shown
