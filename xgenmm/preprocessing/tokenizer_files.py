"""Reading a checkpoint's tokenizer files: its vocabulary, its encoder and its added tokens.

`tokenizer.json`, `tokenizer_config.json`, `added_tokens.json` and `special_tokens_map.json` are
read from the checkpoint folder, `tokenizer.model` from it or from its parent. The slow convention
needs `tokenizer.model` or `tokenizer.json` (the ids are the same), the fast one `tokenizer.json`.
No code from the folder is executed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import sentencepiece
import tokenizers
from pydantic import BaseModel, Field

from xgenmm.errors import printable
from xgenmm.files import read_file, read_json

T = TypeVar("T")

Convention = Literal["slow", "fast"]
"""Which original tokenizer to reproduce; see `tokenizer.py`."""

Encode = Callable[[str], list[int]]

SPACE = "▁"
"""What SentencePiece writes for a space."""

# A serialized NormalizerSpec(add_dummy_prefix=False). Protocol buffers merge appended fields, so
# this disables SentencePiece's own prefix without a protobuf library.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


TokenId = Annotated[int, Field(ge=0, lt=2**24)]
TokenText = Annotated[str, Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class AddedToken:
    """A token matched before the text is split into SentencePiece pieces, and never split itself.

    Attributes:
        lstrip, rstrip: whether it absorbs the white space before or after it.
        special: whether the fast convention leaves it out of decoded text.
        has_role: whether it is the unk, bos, eos or pad token or one of the model's additional
            tokens; the slow convention leaves these out of decoded text.
    """

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True
    has_role: bool = False


class _Entry(BaseModel):
    """What a file says about an added token."""

    content: TokenText
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True
    normalized: Literal[False] = False  # neither of these two is supported
    single_word: Literal[False] = False


class _EntryWithId(_Entry):
    id: TokenId


class _Role(BaseModel):
    content: str


class _Roles(BaseModel):
    """`special_tokens_map.json`: which tokens have a role."""

    unk_token: _Role | str | None = None
    bos_token: _Role | str | None = None
    eos_token: _Role | str | None = None
    pad_token: _Role | str | None = None

    def texts(self) -> dict[str, str]:
        """Return the token of each role."""
        roles = {"unk": self.unk_token, "bos": self.bos_token}
        roles |= {"eos": self.eos_token, "pad": self.pad_token}
        texts = {n: role.content if isinstance(role, _Role) else role for n, role in roles.items()}
        return {name: text for name, text in texts.items() if text}


class _TokenizerConfig(_Roles):
    """`tokenizer_config.json`."""

    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,7})$")], _Entry] = {}


class _Prepend(BaseModel, extra="allow"):
    type: Literal["Prepend"]


class _Replace(BaseModel, extra="allow"):
    type: Literal["Replace"]
    pattern: dict[Literal["String"], str]


class _Sequence(BaseModel, extra="allow"):
    type: Literal["Sequence"]
    normalizers: list[Annotated[_Prepend | _Replace, Field(discriminator="type")]]


class _Metaspace(BaseModel, extra="allow"):
    type: Literal["Metaspace"]


class _Model(BaseModel, extra="allow"):
    type: Literal["BPE"]
    vocab: Annotated[dict[str, TokenId], Field(min_length=1)]
    merges: list[str] | list[tuple[str, str]]
    dropout: None = None


class _AddedTokens(BaseModel):
    """What is read of a `tokenizer.json` beside `tokenizer.model`."""

    added_tokens: list[_EntryWithId] = []


class _TokenizerJson(_AddedTokens):
    """What is read of any other one: no regular expressions, and nothing random."""

    normalizer: Annotated[_Sequence | _Prepend | _Replace | None, Field(discriminator="type")] = (
        None
    )
    pre_tokenizer: _Metaspace | None = None
    model: _Model


_Entries = dict[int, tuple[str, _Entry]]


def read_vocabulary(folder: Path, convention: Convention) -> tuple[Encode, dict[int, str]]:
    """Read the encoder for plain text, and every SentencePiece piece by its id.

    The encoder does not know added tokens, and adds the `▁` prefix in the fast convention only.

    Raises:
        FileNotFoundError: the folder lacks the files that the convention needs.
        ValueError: a file is malformed.
    """
    json_file = folder / "tokenizer.json"
    model_file = folder / "tokenizer.model"
    if not os.path.lexists(model_file):
        model_file = folder.parent / "tokenizer.model"
    if convention == "slow" and os.path.lexists(model_file):
        return _read_sentencepiece(model_file)
    if os.path.lexists(json_file):
        return _read_tokenizer_json(json_file, convention)
    needed = "tokenizer.model or tokenizer.json" if convention == "slow" else "tokenizer.json"
    raise FileNotFoundError(f"{folder}: its tokenizer needs {needed}, which is missing")


def read_added_tokens(
    folder: Path, vocabulary: Mapping[int, str], extra: Mapping[str, int]
) -> list[AddedToken]:
    """Every added token in the folder's files and in `extra`, ordered by id.

    Raises ValueError if a file is malformed, if the files contradict each other, `vocabulary` or
    `extra`, or if an id is not below those of `extra`.
    """
    entries = _read_entries(folder)
    roles = _read_optional(folder / "special_tokens_map.json", _Roles).texts()
    roles |= _read_optional(folder / "tokenizer_config.json", _TokenizerConfig).texts()
    role_texts = set(roles.values())
    for token_id, piece in vocabulary.items():
        if piece in role_texts:
            entries.setdefault(token_id, ("the vocabulary", _Entry(content=piece)))
    for text, token_id in extra.items():
        file, present = entries.setdefault(token_id, ("config.json", _Entry(content=text)))
        piece = vocabulary.get(token_id, present.content)
        if (present.content, piece) != (text, text):
            other = piece if present.content == text else present.content
            raise ValueError(
                f"{folder / file}: id {token_id} is {printable(other)!r}, so it cannot be "
                f"{text!r}, which text_config.initial_tokenizer_len of config.json makes it"
            )
    _check_unique(folder, entries, vocabulary)
    _check_ids(folder, entries, vocabulary, extra)
    return [
        AddedToken(
            text=entry.content,
            id=token_id,
            lstrip=entry.lstrip,
            rstrip=entry.rstrip,
            special=entry.special,
            has_role=entry.content in role_texts or entry.content in extra,
        )
        for token_id, (_, entry) in sorted(entries.items())
    ]


def _check_unique(folder: Path, entries: _Entries, vocabulary: Mapping[int, str]) -> None:
    ids: dict[str, int] = {}
    for token_id, (file, entry) in sorted(entries.items()):
        text = printable(entry.content)
        piece = vocabulary.get(token_id, entry.content)
        if piece != entry.content:
            raise ValueError(
                f"{folder / file}: id {token_id} is {text!r}, but also {printable(piece)!r}"
            )
        first = ids.setdefault(entry.content, token_id)
        if first != token_id:
            raise ValueError(f"{folder / file}: {text!r} is id {first}, but also id {token_id}")


def _check_ids(
    folder: Path, entries: _Entries, vocabulary: Mapping[int, str], extra: Mapping[str, int]
) -> None:
    """Refuse ids for which the model has no embedding, or that of an additional token."""
    if not extra:
        return
    limit = min(extra.values())
    highest = max(vocabulary, default=0)
    places = {token_id: (file, entry.content) for token_id, (file, entry) in entries.items()}
    places.setdefault(highest, ("tokenizer.model or tokenizer.json", vocabulary.get(highest, "")))
    for token_id, (file, text) in places.items():
        if token_id >= limit and text not in extra:
            raise ValueError(
                f"{folder / file}: id {token_id} is {printable(text)!r}, but ids should be below "
                f"{limit}, text_config.initial_tokenizer_len of config.json"
            )


def _read_entries(folder: Path) -> _Entries:
    """The files' descriptions of the added tokens, by id, each with the name of its file.

    Where files disagree, `tokenizer_config.json` wins, as in the original.
    """
    entries: _Entries = {}
    file = "added_tokens.json"
    for text, token_id in _read_optional(folder / file, dict[TokenText, TokenId]).items():
        entries[token_id] = (file, _Entry(content=text))
    file = "tokenizer.json"
    for entry in _read_optional(folder / file, _AddedTokens).added_tokens:
        entries[entry.id] = (file, entry)
    file = "tokenizer_config.json"
    config = _read_optional(folder / file, _TokenizerConfig)
    for key, described in config.added_tokens_decoder.items():
        entries[int(key)] = (file, described)
    return entries


def _read_sentencepiece(path: Path) -> tuple[Encode, dict[int, str]]:
    content = read_file(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({printable(error)})") from error
    return model.encode, {i: model.id_to_piece(i) for i in range(model.get_piece_size())}


def _read_tokenizer_json(path: Path, convention: Convention) -> tuple[Encode, dict[int, str]]:
    """Read the same from a `tokenizer.json`, ignoring its added tokens.

    For the slow convention its normalizer is replaced by one that adds no prefix, which makes its
    ids those of `tokenizer.model`.
    """
    description = read_json(path, _TokenizerJson).model_dump(
        include={"normalizer", "pre_tokenizer", "model"}
    )
    if convention == "slow":
        description["normalizer"] = {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": SPACE,
        }
    try:
        model = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(
            f"{path} is not a valid tokenizer description ({printable(error)})"
        ) from error

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return encode, {token_id: piece for piece, token_id in model.get_vocab().items()}


def _read_optional(path: Path, kind: type[T]) -> T:
    """What a JSON file contains, or an empty one if there is no such file."""
    return read_json(path, kind) if os.path.lexists(path) else kind()
