"""Streaming detokenizer: token ids -> text, as soon as it is final and in whole characters."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xgenmm.preprocessing.tokenizer_files import SPACE, AddedToken, Convention

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class DecodingTable:
    """What each token id decodes to; an id in none of the mappings decodes to nothing.

    Attributes:
        texts: the text of each piece, with its spaces.
        byte_values: the byte of each byte-fallback piece, which is a part of a UTF-8 character.
        separated: the text of each special token that the slow convention keeps, set off by spaces.
    """

    texts: Mapping[int, str]
    byte_values: Mapping[int, int]
    separated: Mapping[int, str]

    @classmethod
    def build(
        cls,
        convention: Convention,
        vocabulary: Mapping[int, str],
        added_tokens: Iterable[AddedToken],
    ) -> "DecodingTable":
        """Build the table of a convention, from pieces by id and added tokens."""
        added = {token.id: token for token in added_tokens}
        pieces = {i: piece for i, piece in vocabulary.items() if i not in added}
        byte_values = {
            i: int(match[1], 16)
            for i, piece in pieces.items()
            if (match := _BYTE_PIECE.fullmatch(piece))
        }
        texts = {i: p.replace(SPACE, " ") for i, p in pieces.items() if i not in byte_values}
        if convention == "slow":
            separated = {i: token.text for i, token in added.items() if not token.has_role}
            return cls(texts, byte_values, separated)
        texts |= {i: token.text for i, token in added.items() if not token.special}
        return cls(texts, byte_values, {})


class Detokenizer:
    """Decodes one stream of token ids.

    The text of all `push` calls and the final `flush` equals `Tokenizer.decode` of all ids; text
    once returned is never revised. Only the bytes of an incomplete character are held back.
    """

    def __init__(self, table: DecodingTable) -> None:
        self._table = table
        self._incomplete = b""
        self._at_start = True  # of a stretch of text, whose leading space is the encoder's prefix
        self._needs_space = False  # before the next separated token

    def push(self, token: int) -> str:
        """Add one token and return the text that is now final, possibly empty."""
        if (value := self._table.byte_values.get(token)) is not None:
            text, self._incomplete = _split_incomplete(self._incomplete + bytes([value]))
            return self._append(text)
        if text := self._table.texts.get(token, ""):
            if self._at_start:
                text = text.removeprefix(" ")
            return self._append(self.flush() + text)
        if token in self._table.separated:
            before = self.flush() + (" " if self._needs_space else "")
            self._needs_space = self._at_start = True
            return before + self._table.separated[token]
        return ""

    def flush(self) -> str:
        """End the stream: return U+FFFD for each byte of an incomplete character."""
        text = "\N{REPLACEMENT CHARACTER}" * len(self._incomplete)
        self._incomplete = b""
        self._needs_space = self._needs_space or text != ""
        return text

    def _append(self, text: str) -> str:
        """Continue the current stretch of text, or start one after a separated token."""
        result = " " + text if self._at_start and self._needs_space else text
        self._needs_space = text != "" or (self._needs_space and not self._at_start)
        self._at_start = False
        return result


def _split_incomplete(data: bytes) -> tuple[str, bytes]:
    """Decode UTF-8 up to a character at the end that more bytes may complete.

    Bytes that cannot belong to any character become U+FFFD.
    """
    text = ""
    while True:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + "\N{REPLACEMENT CHARACTER}", data[1:]
