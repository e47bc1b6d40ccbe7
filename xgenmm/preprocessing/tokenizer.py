"""Text <-> token ids, with a checkpoint's own tokenizer files, in one of two conventions.

The released models were trained on ids that depend on the convention, and a current
`transformers` gives neither, so the few lines that matter are written out here:

* **slow** (instruct models): what `LlamaTokenizer(legacy=False)` of transformers 4.41 gave. The
  whole text gets one `▁` in front, and text after a special token gets none. A special token that
  opens the text therefore follows a lone `▁`, unless it has a role (unk, bos, eos, pad or extra).
* **fast** (base models): what `LlamaTokenizerFast` of transformers 4.41 gave. Every stretch of
  text between special tokens gets its own `▁`.

Both cut the text at its special tokens first (leftmost, then longest), and a special token with
`rstrip` swallows the white space after it.

Files read: `tokenizer.json`, `tokenizer_config.json`, `added_tokens.json` and
`special_tokens_map.json` from the folder, `tokenizer.model` from it or the one above. The slow
convention needs `tokenizer.model` or `tokenizer.json` (the ids are the same), the fast one
`tokenizer.json`. Nothing of the folder is run, and no id is built into this module.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import sentencepiece
import tokenizers

Convention = Literal["slow", "fast"]

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
# A serialised NormalizerSpec(add_dummy_prefix=False). Protocol buffers merge what is appended, so
# this switches SentencePiece's own prefix off without needing a protobuf library.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SpecialToken(str):
    """A special token in a list of pieces, e.g. `Control("<|end|>")`; a plain `str` is text."""

    __slots__ = ()


Segment = str | SpecialToken


@dataclass(frozen=True)
class AddedToken:
    """An added token: found before the text is split into pieces, and never split itself."""

    text: str
    id: int
    lstrip: bool = False  # swallows white space before it
    rstrip: bool = False  # swallows white space after it
    special: bool = True  # the fast convention does not decode it
    role: bool = False  # unk, bos, eos, pad or extra: the slow convention does not decode it


class Tokenizer:
    """A checkpoint's tokenizer. Not changed once built, so threads may share it.

    `specials` maps every special token, the `extra` ones included, to its id, `pieces` every id to
    its piece; `vocab_size` is the highest id plus one.
    """

    def __init__(
        self,
        convention: Convention,
        encode_text: Callable[[str], list[int]],
        vocabulary: Mapping[int, str],
        specials: Sequence[AddedToken],
    ) -> None:
        """`encode_text` gives the ids of text without specials, `vocabulary` an id's piece."""
        self.convention = convention
        self.specials: Mapping[str, int] = MappingProxyType({s.text: s.id for s in specials})
        self.pieces: Mapping[int, str] = MappingProxyType(
            {**vocabulary, **{s.id: s.text for s in specials}}
        )
        self.vocab_size = max(*vocabulary, *self.specials.values()) + 1
        self._encode_text = encode_text
        self._special_tokens = {s.text: s for s in specials}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

        # What an id decodes to: text, a byte of a character or, in `_apart`, text set apart by
        # spaces. An id in none of the three gives nothing.
        special_ids = set(self.specials.values())
        plain = {i: piece for i, piece in vocabulary.items() if i not in special_ids}
        self._bytes = {i: int(m[1], 16) for i, p in plain.items() if (m := _BYTE.fullmatch(p))}
        self._texts = {i: p.replace(_SPACE, " ") for i, p in plain.items() if i not in self._bytes}
        self._apart: dict[int, str] = {}
        if convention == "slow":
            self._apart = {s.id: s.text for s in specials if not s.role}
        else:
            self._texts |= {s.id: s.text for s in specials if not s.special}

    @classmethod
    def from_folder(
        cls, folder: Path, convention: Convention, extra: Mapping[str, int]
    ) -> "Tokenizer":
        """Read a checkpoint's tokenizer files.

        `extra` are the special tokens that live beside the language model's vocabulary, with their
        ids, e.g. `<image>`. Raises FileNotFoundError when the files that the convention needs are
        missing, and ValueError when they contradict each other or `extra`.
        """
        folder = Path(folder)
        json_file = folder / "tokenizer.json"
        model_file = folder / "tokenizer.model"
        if not model_file.exists():
            model_file = folder.parent / "tokenizer.model"
        if convention == "slow" and model_file.exists():
            encode_text, vocabulary = _read_sentencepiece(model_file)
        elif json_file.exists():
            encode_text, vocabulary = _read_tokenizer_json(json_file, convention)
        else:
            wanted = "tokenizer.model or tokenizer.json" if convention == "slow" else json_file.name
            raise FileNotFoundError(f"{folder}: its tokenizer needs {wanted}, which is not there")
        return cls(convention, encode_text, vocabulary, _read_specials(folder, vocabulary, extra))

    def text_bytes(self, token: int) -> bytes:
        """What a token adds to a running text, as UTF-8; nothing for a special token.

        `Detokenizer` drops one leading space when the text begins with it.
        """
        if token in self.specials.values():
            return b""
        if token in self._bytes:
            return bytes([self._bytes[token]])
        return self._texts.get(token, "").encode()

    def id(self, token: str) -> int:
        """A special token's id; KeyError when this tokenizer has no such special token."""
        try:
            return self.specials[token]
        except KeyError:
            known = " ".join(self.specials)
            raise KeyError(f"{token!r} is not one of the special tokens {known}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which every special token is recognised, whoever wrote it.

        For trusted text only: a prompt with a user's words in it goes through `encode_segments`.
        """
        return self.encode_segments(list(self._cut(text)))

    def encode_segments(self, pieces: Sequence[Segment]) -> list[int]:
        """Ids of a text given in pieces, of which only the `SpecialToken` ones are special tokens.

        Neighbouring plain strings are one text: how it is cut makes no difference. Raises KeyError
        for a `SpecialToken` that is no special token of this tokenizer.
        """
        segments = self._segments(pieces)
        if self.convention == "slow" and segments:
            # The one prefix belongs to the text as a whole, even when a special token opens it.
            if not isinstance(segments[0], SpecialToken):
                segments[0] = _SPACE + segments[0]
            elif not self._special_tokens[segments[0]].role:
                segments.insert(0, _SPACE)
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, SpecialToken):
                ids.append(self.specials[segment])
            else:
                ids += self._encode_text(segment)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special tokens and ids that the tokenizer does not have give nothing.

        As in the original, the slow convention leaves out only the special tokens with a role and
        sets the others, such as `<|end|>`, apart by spaces. A byte that is no part of a UTF-8
        character becomes U+FFFD, and its neighbours are kept (the original fast tokenizer gave up
        the whole run of bytes).
        """
        stream = self.detokenizer()
        return "".join(map(stream.push, ids)) + stream.flush()

    def detokenizer(self) -> "Detokenizer":
        """A new stream that turns ids into text one at a time."""
        return Detokenizer(self)

    def _cut(self, text: str) -> Iterator[Segment]:
        end = 0
        for match in self._any_special.finditer(text):
            yield text[end : match.start()]
            yield SpecialToken(match[0])
            end = match.end()
        yield text[end:]

    def _segments(self, pieces: Sequence[Segment]) -> list[Segment]:
        """One text between any two special tokens, without the white space that they swallow."""
        segments: list[Segment] = []
        for is_control, group in groupby(pieces, key=lambda piece: isinstance(piece, SpecialToken)):
            if is_control:
                segments += group
            else:
                segments.append(self._typed("".join(group)))
        for i, segment in enumerate(segments):
            if not isinstance(segment, SpecialToken):
                continue
            self.id(segment)  # refuses an unknown token
            token = self._special_tokens[segment]
            if (
                token.rstrip
                and i + 1 < len(segments)
                and not isinstance(segments[i + 1], SpecialToken)
            ):
                segments[i + 1] = segments[i + 1].lstrip()
            if token.lstrip and i > 0 and not isinstance(segments[i - 1], SpecialToken):
                segments[i - 1] = segments[i - 1].rstrip()
        return [segment for segment in segments if segment]

    def _typed(self, text: str) -> str:
        """The slow convention takes a typed `▁` for the space that it stands for."""
        return text.replace(_SPACE, " ") if self.convention == "slow" else text


class Detokenizer:
    """Ids in, text out, as soon as it is certain and in whole characters only.

    All pushes and the final flush together equal `Tokenizer.decode` of all ids: nothing that was
    given out is ever taken back. Only the bytes of one unfinished character wait inside.
    """

    def __init__(self, tokens: Tokenizer) -> None:
        self._texts, self._bytes, self._apart = tokens._texts, tokens._bytes, tokens._apart
        self._unfinished = b""
        self._opens = True  # the next text opens a stretch: its leading space is the prefix
        self._space_due = False  # a space must stand before the next token set apart

    def push(self, token: int) -> str:
        """Text that is certain now that `token` has arrived; may be empty."""
        if (byte := self._bytes.get(token)) is not None:
            text, self._unfinished = _characters(self._unfinished + bytes([byte]))
            return self._continue(text)
        if (text := self._texts.get(token, "")) != "":
            if self._opens:
                text = text.removeprefix(" ")
            return self._continue(self.flush() + text)
        if token in self._apart:
            before = self.flush() + (" " if self._space_due else "")
            self._space_due = self._opens = True
            return before + self._apart[token]
        return ""

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for each byte of an unfinished character."""
        text = "\N{REPLACEMENT CHARACTER}" * len(self._unfinished)
        self._unfinished = b""
        self._space_due = self._space_due or text != ""
        return text

    def _continue(self, text: str) -> str:
        """Add to the current stretch of text, or open one."""
        parted = " " + text if self._opens and self._space_due else text
        self._space_due = text != "" or (self._space_due and not self._opens)
        self._opens = False
        return parted


def _characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into text and the beginning of a character that may still be completed.

    A byte that cannot be part of a character becomes U+FFFD.
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


def _read_sentencepiece(file: Path) -> tuple[Callable[[str], list[int]], dict[int, str]]:
    """The encoder of a `tokenizer.model`, adding no prefix of its own, and its pieces by id."""
    try:
        model = sentencepiece.SentencePieceProcessor(
            model_proto=file.read_bytes() + _NO_DUMMY_PREFIX
        )
    except RuntimeError as error:
        raise ValueError(f"{file}: not a SentencePiece model ({error})") from error
    return model.encode, {i: model.id_to_piece(i) for i in range(model.get_piece_size())}


def _read_tokenizer_json(
    file: Path, convention: Convention
) -> tuple[Callable[[str], list[int]], dict[int, str]]:
    """The encoder of a `tokenizer.json` without its added tokens, and its pieces by id.

    In the slow convention it adds no prefix, which makes it the encoder of `tokenizer.model`.
    """
    description = _read_json(file)
    description["added_tokens"] = []
    if convention == "slow":
        description["normalizer"] = {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": _SPACE,
        }
    # The library raises a bare Exception for a description that it cannot use.
    try:
        model = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:
        raise ValueError(f"{file}: not a tokenizer description ({error})") from error

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return encode, {i: piece for piece, i in model.get_vocab().items()}


def _read_specials(
    folder: Path, vocabulary: Mapping[int, str], extra: Mapping[str, int]
) -> list[AddedToken]:
    """Every special token that the folder's files name, and the `extra` ones, in order of id."""
    entries = _read_added_tokens(folder)
    named = _read_json(folder / "special_tokens_map.json")
    named |= _read_json(folder / "tokenizer_config.json")
    roles = [_content(named[role]) for role in _ROLES if named.get(role)]
    for number, piece in vocabulary.items():
        if piece in roles:
            entries.setdefault(number, {"content": piece})
    for text, number in extra.items():
        held = entries.setdefault(number, {"content": text})["content"]
        if held != text:
            raise ValueError(f"{folder}: id {number} is {held!r}, so it cannot be {text!r}")

    specials = [
        AddedToken(
            text=entry["content"],
            id=number,
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            special=entry.get("special", True),
            role=entry["content"] in roles or entry["content"] in extra,
        )
        for number, entry in sorted(entries.items())
    ]
    seen: dict[str, int] = {}
    for token in specials:
        piece = vocabulary.get(token.id, token.text)
        if piece != token.text:
            raise ValueError(f"{folder}: id {token.id} is {token.text!r}, but also {piece!r}")
        first = seen.setdefault(token.text, token.id)
        if first != token.id:
            raise ValueError(f"{folder}: {token.text!r} is id {first}, but also id {token.id}")
    return specials


def _read_added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """How the folder describes its added tokens, by id.

    Where files differ, `tokenizer_config.json` has the last word, as in the original.
    """
    entries: dict[int, dict[str, Any]] = {}
    for text, number in _read_json(folder / "added_tokens.json").items():
        entries[number] = {"content": text}
    for entry in _read_json(folder / "tokenizer.json").get("added_tokens", []):
        entries[entry["id"]] = entry
    config = _read_json(folder / "tokenizer_config.json")
    for key, entry in config.get("added_tokens_decoder", {}).items():
        entries[int(key)] = entry
    for entry in entries.values():
        if entry.get("normalized") or entry.get("single_word"):
            raise ValueError(
                f"{folder}: the added token {entry['content']!r} is `normalized` or `single_word`; "
                "only tokens that are neither can be read"
            )
    return entries


def _content(entry: str | Mapping[str, Any]) -> str:
    """The text of a token that a file gives as a string or as a description."""
    return entry if isinstance(entry, str) else entry["content"]


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a JSON object was expected, not {type(content).__name__}")
    return content
