"""cog-safe-push.yaml with the demo checkpoint: its test cases, and what its fuzzing leaves."""

from random import Random
from typing import Any

import pytest
import yaml

from tests.server.client import answer, ask
from tests.support.form_inputs import form_inputs
from tests.support.paths import ROOT
from tests.support.server import LocalServer

PREDICT: dict[str, Any] = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())["predict"]
CASES: list[dict[str, Any]] = PREDICT["test_cases"]
FUZZ: dict[str, Any] = PREDICT["fuzz"]


@pytest.mark.parametrize("case", CASES, ids=[str(index) for index in range(len(CASES))])
def test_case_holds(server: LocalServer, case: dict[str, Any]) -> None:
    prediction = ask(server, **case["inputs"])
    if "error_contains" in case:
        assert case["error_contains"] in prediction["error"]
    elif "exact_string" in case:
        assert answer(prediction) == case["exact_string"]
    elif "match_prompt" in case:
        assert "red" in answer(prediction)
    else:
        assert answer(prediction)


def test_case_that_is_compared_with_the_version_before_is_deterministic() -> None:
    assert "seed" in CASES[0]["inputs"]
    assert "exact_string" in CASES[0]


def test_random_inputs_are_answered(server: LocalServer) -> None:
    random = Random(0)
    for _ in range(10):
        inputs = form_inputs(random, FUZZ["fixed_inputs"], FUZZ["disabled_inputs"])
        assert answer(ask(server, **inputs)), inputs
