"""Question templates."""

import pytest

from xgenmm import InputError
from xgenmm.captioning.templates import escape_template, template_columns


def test_template_columns_are_the_names_in_single_braces() -> None:
    assert template_columns(escape_template("a {b} }")) == []
    assert template_columns("{a b} and {c.d}, {{e}}") == ["a b", "c.d"]


def test_malformed_template_is_rejected() -> None:
    for template in ("{", "{}", "{a!r}", "{a:>3}"):
        with pytest.raises(InputError, match=r"^template: .*write \{column\}"):
            template_columns(template)
