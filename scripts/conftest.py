"""Fixtures for the tests of the scripts: Cog's server with the demo checkpoint."""

from collections.abc import Iterator

import pytest

from scripts.local_server import LocalServer, serving

LOAD_SECONDS = 120.0


@pytest.fixture(scope="session")
def server() -> Iterator[LocalServer]:
    """Cog's server with the demo checkpoint."""
    with serving({"XGENMM_MODEL": "demo"}) as started:
        started.wait_ready(LOAD_SECONDS)
        yield started
