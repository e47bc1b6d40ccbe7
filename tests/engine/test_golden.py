"""The engine reproduces the original implementation's ids in a batch with other requests."""

import pytest

from tests.support import golden_data
from xgenmm.evaluation.engine_parity import check_engine


@pytest.mark.parametrize(
    ("name", "count", "num_blocks", "preemptions"),
    [("v15_anyres", 24, 1024, 0), ("v15_anyres", 24, 7, 30), ("v1_instruct", 5, 1024, 0)],
)
def test_golden_ids_are_reproduced_in_a_mixed_batch(
    name: str, count: int, num_blocks: int, preemptions: int
) -> None:
    compared, preempted = check_engine(golden_data.folder(name), seed=5, num_blocks=num_blocks)
    assert sum(one.golden for one in compared) == count
    assert {one.name: one.found for one in compared} == {one.name: one.expected for one in compared}
    assert preempted >= preemptions
