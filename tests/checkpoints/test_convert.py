"""Conversion to bfloat16, including runs that are killed at a given byte or fill the disk."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hub_repository import BIG, SMALL, tensors
from xgenmm.checkpoints.convert import convert
from xgenmm.checkpoints.manifest import verify
from xgenmm.errors import CheckpointError


def assert_converted(target: Path, source: Path) -> None:
    assert verify(target, {})
    original = {n: t for path in source.glob("*.safetensors") for n, t in load_file(path).items()}
    written = {n: t for path in target.glob("*.safetensors") for n, t in load_file(path).items()}
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        expected = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(written[name], expected)
    others = {path.name for path in target.iterdir() if path.suffix != ".safetensors"}
    assert others == {
        "config.json", "manifest.json", "model.safetensors.index.json", "tokenizer.model"
    }  # fmt: skip
    assert not target.with_name("mine-bf16.partial").exists()


@pytest.mark.parametrize("shard_bytes", [1, 70_000, 10**9])
def test_convert_writes_the_same_values_in_bfloat16(source: Path, shard_bytes: int) -> None:
    target = convert(source, shard_bytes)
    assert_converted(target, source)
    count = {1: 8, 70_000: 4, 10**9: 1}[shard_bytes]
    assert len(list(target.glob("*.safetensors"))) == count
    with pytest.raises(CheckpointError, match="bfloat16 already"):
        convert(target)


# The kernel kills a process that exceeds its file size limit, so the limit sets the exact byte.
KILLED_AT_A_BYTE = """
import resource, signal, sys
from pathlib import Path
from xgenmm.checkpoints.convert import convert
signal.signal(signal.SIGXFSZ, getattr(signal, sys.argv[3]))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
convert(Path(sys.argv[1]), 70_000)
"""


def convert_with_limit(source: Path, limit: int, action: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_AT_A_BYTE, str(source), str(limit), action]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("limit", "finished"), [(0, 0), (100, 0), (40_000, 0), (100_000, 3)])
def test_killed_conversion_is_resumed(source: Path, limit: int, finished: int) -> None:
    """Three shards have 65 kB and the last 160 kB, so only the highest limit lets any finish."""
    staging = source.with_name("mine-bf16.partial")
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, finished + 1)]
    written: dict[str, int] = {}
    for _ in range(2):
        killed = convert_with_limit(source, limit, "SIG_DFL")
        assert killed.returncode == -signal.SIGXFSZ
        assert not source.with_name("mine-bf16").exists()
        written = written or {name: (staging / name).stat().st_mtime_ns for name in names}
    target = convert(source, 70_000)
    assert_converted(target, source)
    for name, time in written.items():
        assert (target / name).stat().st_mtime_ns == time


def test_conversion_starts_over_if_the_source_has_changed(source: Path) -> None:
    convert_with_limit(source, 100_000, "SIG_DFL")
    save_file(tensors(2, 1), source / SMALL)
    save_file({name: -t for name, t in tensors(4, 2).items()}, source / BIG)
    assert_converted(convert(source, 70_000), source)


def test_full_disk_during_conversion_is_reported(source: Path) -> None:
    refused = convert_with_limit(source, 40_000, "SIG_IGN")
    assert refused.returncode == 1
    assert "model-00001-of-00004.safetensors: " in refused.stderr
    assert "File too large (os error 27); free some disk space" in refused.stderr
    assert not source.with_name("mine-bf16").exists()
    assert_converted(convert(source, 70_000), source)
