"""The parts `gpu` and `cpu` on tiny models, whose figures mean nothing."""

import json
from pathlib import Path

import pytest

from scripts.benchmarks.__main__ import main


def figures(part: str, folder: Path) -> dict[tuple[str, str], float]:
    """The values of a part by (part, measured)."""
    file = folder / "figures.json"
    main([part, "--tiny", "--json", str(file)])
    return {
        (row["part"], row["measured"]): row["value"] for row in json.loads(file.read_text())["rows"]
    }


@pytest.mark.timeout(300)
def test_gpu_part_reports_all_measurements(tmp_path: Path) -> None:
    found = figures("gpu", tmp_path)
    assert {part for part, _ in found} >= {
        "ceilings",
        "server",
        "start",
        "memory",
        "quantised",
        "decode",
        "first token",
        "answer",
        "vision",
        "correctness",
        "transformers float32",
    }
    assert found["correctness", "logits against float32, relative"] < 1e-5


def test_cpu_part_compares_prefill_and_decode(tmp_path: Path) -> None:
    found = figures("cpu", tmp_path)
    assert {"prefill, times as fast", "decode, times as fast"} <= {name for _, name in found}
