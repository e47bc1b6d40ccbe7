"""A conversation -> its text, token ids and labels, as the authors' training makes them.

Special tokens spelled out in a text are special tokens here, as in the authors' data set, and every
`<s>` is removed. Learned are the answers, each with the `<|end|>` after it.

Where the original fails to find the answers in its own prompt (it cuts the text at `<|end|>` and a
newline, and ignores the sample if the lengths do not add up), the labels here are what it means to
learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xgenmm.finetuning.batch import IGNORED, SpecialIds
from xgenmm.preprocessing.prompts import (
    ASSISTANT,
    DEFAULT_SYSTEM_PROMPT,
    END,
    IMAGE,
    SYSTEM,
    USER,
)
from xgenmm.preprocessing.tokenizer import Tokenizer

MAX_TEXT_TOKENS = 2048
"""Of a sample, before its images are put in; the authors' limit."""

PAD = "<pad>"
BOS = "<s>"


@dataclass(frozen=True)
class Turn:
    """A turn: `role` is system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """The ids of a conversation and its labels, after the cut.

    Attributes:
        ids, labels: of equal length; a label is the token itself or `IGNORED`.
        uncut: number of tokens before the cut.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    uncut: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Look up the tokens that the loss never counts. Raises KeyError if there is no `<pad>`."""
    image = tokenizer.id(IMAGE)
    additional = tuple(token for token in tokenizer.specials.values() if token >= image)
    return SpecialIds(tokenizer.id(PAD), image, additional)


def with_system_turn(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Put the default system prompt first, unless the conversation opens with one of its own.

    An empty one stays an empty turn.
    """
    if turns and turns[0].role == "system":
        return tuple(turns)
    return (Turn("system", DEFAULT_SYSTEM_PROMPT), *turns)


def tokenize(
    turns: Sequence[Turn], tokenizer: Tokenizer, max_tokens: int = MAX_TEXT_TOKENS
) -> Tokens:
    """Tokenize a conversation whose first turn is the system prompt.

    An answer is where the text before it ends, in tokens: both are bounded by special tokens, so
    the ids of a part do not depend on what follows.
    """
    parts = list(_parts(turns))
    ids = tokenizer.encode("".join(text for text, _ in parts))
    labels, before = [IGNORED] * len(ids), ""
    for text, learned in parts:
        if learned:
            start, end = len(tokenizer.encode(before)), len(tokenizer.encode(before + text))
            labels[start:end] = ids[start:end]
        before += text
    return Tokens(tuple(ids[:max_tokens]), tuple(labels[:max_tokens]), len(ids))


def _parts(turns: Sequence[Turn]) -> Iterator[tuple[str, bool]]:
    """Yield the text of each turn with its special tokens, and whether it is learned."""
    for turn in turns:
        text = turn.text.replace(BOS, "")
        if turn.role == "system":
            yield f"{SYSTEM}\n{text}{END}\n", False
        elif turn.role == "user":
            yield f"{USER}\n{text}{END}\n{ASSISTANT}\n", False
        else:
            yield f"{text}{END}\n", True


def marked_text(tokens: Tokens, tokenizer: Tokenizer, marks: tuple[str, str] = ("[[", "]]")) -> str:
    """Return the text of token ids, with what is learned between `marks`."""
    ends_line = {tokenizer.id(token) for token in (SYSTEM, USER, ASSISTANT, END)}
    shown, learned, newline = bytearray(), False, b""
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        if (label != IGNORED) != learned:
            mark = marks[learned].encode()
            shown += mark + newline if learned else newline + mark
            learned = not learned
        else:
            shown += newline
        shown += tokenizer.text_bytes(token) or tokenizer.pieces[token].encode()
        newline = b"\n" * (token in ends_line)  # the token absorbs it
    shown += marks[1].encode() * learned
    return shown.decode(errors="replace").lstrip(" ")
