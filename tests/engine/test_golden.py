"""The engine reproduces the original implementation's ids in a batch with other requests."""

import pytest

from tests.support import golden_data
from xgenmm.evaluation.engine_parity import check_engine


@pytest.mark.parametrize(("name", "count"), [("v15_anyres", 24), ("v1_instruct", 5)])
def test_golden_ids_are_reproduced_in_a_mixed_batch(name: str, count: int) -> None:
    compared = check_engine(golden_data.folder(name), seed=5)
    assert sum(one.golden for one in compared) == count
    assert {one.name: one.found for one in compared} == {one.name: one.expected for one in compared}
