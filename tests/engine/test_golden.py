"""What the original implementation computed, all at once, beside neighbours of other settings."""

import pytest

from tests.support import golden_data
from xgenmm.evaluation.engine_parity import check_engine


@pytest.mark.parametrize(("name", "known"), [("v15_anyres", 24), ("v1_instruct", 5)])
def test_golden_ids_beside_neighbours(name: str, known: int) -> None:
    compared = check_engine(golden_data.folder(name), seed=5)
    assert sum(one.golden for one in compared) == known
    assert {one.name: one.found for one in compared} == {one.name: one.expected for one in compared}
