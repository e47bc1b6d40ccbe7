"""Verification of a checkpoint folder against its manifest."""

from pathlib import Path

import pytest

from tests.support.hub_repository import SMALL
from xgenmm.checkpoints.manifest import verify, write_manifest
from xgenmm.errors import CheckpointError


def test_verification_needs_a_manifest_or_a_record(source: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"it has no manifest\.json, and releases\.json has no record"
    ):
        verify(source, {})
    write_manifest(source, name="mine")
    assert verify(source, {})
    (source / SMALL).unlink()
    assert not verify(source, {})
