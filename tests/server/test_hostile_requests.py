"""Cases of `scripts.hostile.server` that are fast, and a normal request after them."""

import pytest

from scripts.hostile.image_cases import image_cases
from scripts.hostile.input_cases import input_cases
from scripts.hostile.protocol_cases import protocol_cases
from scripts.hostile.server import outcome_of
from tests.server.client import assert_answers
from tests.support.server import LocalServer

CASES = (*image_cases(), *input_cases(), *protocol_cases())


@pytest.mark.parametrize("group", ["image inputs", "parameters", "protocol: requests"])
def test_hostile_requests_are_answered_or_refused_clearly(server: LocalServer, group: str) -> None:
    cases = [case for case in CASES if case.group == group]
    assert len(cases) > 40
    outcomes = {case.name: outcome_of(case, server.url) for case in cases}
    assert not {name: problem for name, problem in outcomes.items() if problem}
    assert_answers(server)
