"""The engine reproduces the original implementation's ids in a batch with other requests."""

import pytest

from tests.support import golden_data
from xgenmm.evaluation.engine_parity import check_engine


@pytest.mark.parametrize(
    ("name", "count", "few_blocks", "preemptions"),
    [
        ("v15_anyres", 24, False, 0),
        ("v15_anyres", 24, True, 30),
        ("v1_instruct", 5, False, 0),
        ("v15_video_gttm", 8, True, 5),
        ("v15_video_tl", 4, False, 0),
    ],
)
def test_golden_ids_are_reproduced_in_a_mixed_batch(
    name: str, count: int, few_blocks: bool, preemptions: int
) -> None:
    compared, preempted = check_engine(golden_data.folder(name), seed=5, few_blocks=few_blocks)
    assert sum(one.golden for one in compared) == count
    assert {one.name: one.found for one in compared} == {one.name: one.expected for one in compared}
    assert preempted >= preemptions
