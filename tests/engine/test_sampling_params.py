"""Ranges and error messages of the sampling settings."""

import math
from typing import Any

import pytest

from xgenmm.engine.sampling_params import LIMITS, SamplingParams
from xgenmm.errors import InputError


def test_defaults() -> None:
    assert SamplingParams() == SamplingParams(768, 0.0, 1.0, 0, 1, 1.0, (), None)


@pytest.mark.parametrize("name", LIMITS)
def test_range_of_each_setting(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low, high):
        settings: dict[str, Any] = {name: value}
        assert getattr(SamplingParams(**settings), name) == value
    wrong: list[Any] = [low - 1, high + 1, math.nan, "1", True]
    for value in wrong:
        with pytest.raises(InputError, match=f"^{name}: must be a .*number from"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens: must be a whole number from 1 to 2048, not 1.5"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams: 2 beams .* set temperature to 0"),
        ({"stop_sequences": "end"}, "stop_sequences: must be a list of texts, not 'end'"),
        ({"stop_sequences": ("a", "")}, "stop_sequences: each must be a non-empty text"),
        ({"stop_sequences": (3,)}, "stop_sequences: each must be a non-empty text, not 3"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences: 17 texts given; at most 16"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        SamplingParams(**settings)


def test_stop_sequences_become_a_tuple() -> None:
    from_a_list: Any = ["a", "b"]
    assert SamplingParams(stop_sequences=from_a_list).stop_sequences == ("a", "b")


def test_top_p_of_0_takes_the_most_likely_token() -> None:
    assert SamplingParams(temperature=1.5, top_p=0).temperature == 0
