"""INPUT and OUTPUT: a record is an image or video with its questions, a row is an answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One image or video of INPUT and the questions about it.

    id: unique in INPUT and the same in every run: the path in a folder, the row number of a table
        (from 0), or `TAR/KEY`.
    image: the image or video as INPUT names it.
    source: the file or http(s) URL that contains it.
    offset, size: its byte range in `source`; the whole file if `size` is None.
    questions: the templates, filled with the columns of this record.
    error: why the record cannot be used, if listing it already showed that; `questions` are then
        the unfilled templates.
    """

    id: str
    image: str
    source: str
    offset: int = 0
    size: int | None = None
    questions: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Row:
    """One question and its answer, as written to OUTPUT. `text` is None if there is an `error`."""

    id: str
    image: str
    question: str
    text: str | None = None
    prompt_tokens: int = 0
    image_tokens: int = 0
    output_tokens: int = 0
    stop_reason: str | None = None
    error: str | None = None


def escape_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by escapes such as `\\udcff`.

    They come from file names that are not valid UTF-8, and from JSON.
    """
    return text.encode("utf-8", "backslashreplace").decode()


class UniqueIds:
    """Makes ids distinct: a second `a` becomes `a#2`, or `a#3` if there was an `a#2` before."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, id_: str) -> str:
        """Return `id_`, with a number if it was returned before."""
        unique, number = id_, self._numbers.get(id_, 1)
        while unique in self._numbers:
            number += 1
            unique = f"{id_}#{number}"
        self._numbers[id_] = number
        self._numbers.setdefault(unique, 1)
        return unique
