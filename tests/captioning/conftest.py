"""Fixtures of the captioning tests."""

from pathlib import Path

import pytest

from tests.support import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tiny random weights."""
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))
