"""The errors that users of the library may catch, and the wording of what they have in common."""

import reprlib
from collections.abc import Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LISTED = 8
_NAME_LENGTH = 120
_PROBLEMS = 3


class InputError(ValueError):
    """An input is invalid.

    The message starts with the input's name (`question: ...`) and says what is wrong and what would
    be right.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class EngineError(RuntimeError):
    """The engine failed or is shut down; the request itself was valid."""


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or does not fit the model; the message says what to do."""


def printable(text: object, length: int = _NAME_LENGTH) -> str:
    """Return text from a file or server for a message: on one line, and cut to `length`."""
    shown = " ".join(str(text)[: 4 * length].split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def listed(items: Collection[str], separator: str = ", ") -> str:
    """Join items for a message; only the first few, and how many more there are."""
    shown = [printable(item) for item in islice(items, _LISTED)]
    more = len(items) - len(shown)
    return separator.join(shown) + (f"{separator}and {more:,} more" if more else "")


def explain(
    error: "ValidationError", prefix: str = "", names: Mapping[str, str] | None = None
) -> str:
    """Say which values pydantic refused: field, value and what would be right.

    prefix: of each field's path, e.g. `text_config`.
    names: the file's names of fields that have another name in the model.
    """
    names = names or {}
    problems = []
    for problem in error.errors(include_url=False)[:_PROBLEMS]:
        place = [str(part) for part in problem["loc"] if part != "[key]"]
        path = [prefix] * bool(prefix) + [names.get(part, printable(part)) for part in place]
        field = ".".join(path) or "it"
        value = printable(reprlib.repr(problem["input"]))
        message = problem["msg"].replace("a valid tuple", "a list")
        if problem["type"] == "missing":
            problems.append(f"{field} is missing")
        elif " should " in message:
            rule = message.split(" should ", 1)[1]
            problems.append(f"{field} is {value}, but should {printable(rule)}")
        else:
            problems.append(f"{field} is {value}: {printable(message)}")
    if error.error_count() > _PROBLEMS:
        problems.append(f"and {error.error_count() - _PROBLEMS:,} more errors")
    return "; ".join(problems)
