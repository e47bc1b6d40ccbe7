"""Question templates: text with column names in braces, filled from the columns of a record."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from xgenmm.captioning.records import Record
from xgenmm.errors import InputError

Columns = Mapping[str, Any]


def escape_template(question: str) -> str:
    """Return the template that renders as `question` itself."""
    return question.replace("{", "{{").replace("}", "}}")


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names. Raises InputError for a malformed template."""
    return [column for _, column in _parse(template) if column is not None]


def add_questions(record: Record, columns: Columns, templates: Sequence[str]) -> Record:
    """Return `record` with its questions: the templates, filled from its columns.

    A record without one of the columns gets an error instead.
    """
    names = {name for template in templates for name in template_columns(template)}
    missing = sorted(names - columns.keys())
    if record.error or missing:
        error = f"template: this row has no column {', '.join(map(repr, missing))}"
        return replace(record, questions=tuple(templates), error=record.error or error)
    try:
        questions = tuple(_fill(template, columns) for template in templates)
    except RecursionError:
        error = "template: the value of a column is nested too deeply"
        return replace(record, questions=tuple(templates), error=error)
    return replace(record, questions=questions)


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of literal text and the column that follows it, None after the last text."""
    advice = "write {column}, and {{ or }} for a literal brace"
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError("template", f"{template!r}: {error}; {advice}") from error
    for _, name, format_spec, conversion in fields:
        if name == "" or format_spec or conversion:
            raise InputError(
                "template", f"{template!r} has braces that do not name a column; {advice}"
            )
    return [(text, name) for text, name, _, _ in fields]


def _fill(template: str, columns: Columns) -> str:
    return "".join(
        text + (_as_text(columns[name]) if name is not None else "")
        for text, name in _parse(template)
    )


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)  # Parquet also has times, bytes
    return str(value)
