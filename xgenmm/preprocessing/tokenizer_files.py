"""Reading a checkpoint's tokenizer files: its vocabulary, its encoder and its added tokens.

`tokenizer.json`, `tokenizer_config.json`, `added_tokens.json` and `special_tokens_map.json` are
read from the checkpoint folder, `tokenizer.model` from it or from its parent. The slow convention
needs `tokenizer.model` or `tokenizer.json` (the ids are the same), the fast one `tokenizer.json`.
No code from the folder is executed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from xgenmm.files import read_json_object

Convention = Literal["slow", "fast"]
"""Which original tokenizer to reproduce; see `tokenizer.py`."""

Encode = Callable[[str], list[int]]

SPACE = "▁"
"""What SentencePiece writes for a space."""

_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token")
# A serialized NormalizerSpec(add_dummy_prefix=False). Protocol buffers merge appended fields, so
# this disables SentencePiece's own prefix without a protobuf library.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


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


def read_vocabulary(folder: Path, convention: Convention) -> tuple[Encode, dict[int, str]]:
    """Read the encoder for plain text, and every SentencePiece piece by its id.

    The encoder does not know added tokens, and adds the `▁` prefix in the fast convention only.

    Raises:
        FileNotFoundError: the folder lacks the files that the convention needs.
        ValueError: a file is malformed.
    """
    json_file = folder / "tokenizer.json"
    model_file = folder / "tokenizer.model"
    if not model_file.exists():
        model_file = folder.parent / "tokenizer.model"
    if convention == "slow" and model_file.exists():
        return _read_sentencepiece(model_file)
    if json_file.exists():
        return _read_tokenizer_json(json_file, convention)
    needed = "tokenizer.model or tokenizer.json" if convention == "slow" else "tokenizer.json"
    raise FileNotFoundError(f"{folder}: its tokenizer needs {needed}, which is missing")


def read_added_tokens(
    folder: Path, vocabulary: Mapping[int, str], extra: Mapping[str, int]
) -> list[AddedToken]:
    """Every added token in the folder's files and in `extra`, ordered by id.

    Raises ValueError if the files contradict each other, `vocabulary` or `extra`.
    """
    entries = _read_entries(folder)
    role_map = _read_optional(folder / "special_tokens_map.json")
    role_map |= _read_optional(folder / "tokenizer_config.json")
    role_texts = [_text(role_map[role]) for role in _ROLES if role_map.get(role)]
    for token_id, piece in vocabulary.items():
        if piece in role_texts:
            entries.setdefault(token_id, {"content": piece})
    for text, token_id in extra.items():
        present = entries.setdefault(token_id, {"content": text})["content"]
        if present != text:
            raise ValueError(f"{folder}: id {token_id} is {present!r}, so it cannot be {text!r}")

    added_tokens = [
        AddedToken(
            text=entry["content"],
            id=token_id,
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            special=entry.get("special", True),
            has_role=entry["content"] in role_texts or entry["content"] in extra,
        )
        for token_id, entry in sorted(entries.items())
    ]
    _check_unique(folder, added_tokens, vocabulary)
    return added_tokens


def _check_unique(
    folder: Path, added_tokens: Sequence[AddedToken], vocabulary: Mapping[int, str]
) -> None:
    ids: dict[str, int] = {}
    for token in added_tokens:
        piece = vocabulary.get(token.id, token.text)
        if piece != token.text:
            raise ValueError(f"{folder}: id {token.id} is {token.text!r}, but also {piece!r}")
        first = ids.setdefault(token.text, token.id)
        if first != token.id:
            raise ValueError(f"{folder}: {token.text!r} is id {first}, but also id {token.id}")


def _read_entries(folder: Path) -> dict[int, dict[str, Any]]:
    """The files' descriptions of the added tokens, by id.

    Where files disagree, `tokenizer_config.json` wins, as in the original.
    """
    entries: dict[int, dict[str, Any]] = {}
    for text, token_id in _read_optional(folder / "added_tokens.json").items():
        entries[token_id] = {"content": text}
    for entry in _read_optional(folder / "tokenizer.json").get("added_tokens", []):
        entries[entry["id"]] = entry
    config = _read_optional(folder / "tokenizer_config.json")
    for key, entry in config.get("added_tokens_decoder", {}).items():
        entries[int(key)] = entry
    for entry in entries.values():
        if entry.get("normalized") or entry.get("single_word"):
            raise ValueError(
                f"{folder}: the added token {entry['content']!r} is `normalized` or `single_word`; "
                "neither is supported"
            )
    return entries


def _read_sentencepiece(path: Path) -> tuple[Encode, dict[int, str]]:
    try:
        model = sentencepiece.SentencePieceProcessor(
            model_proto=path.read_bytes() + _NO_DUMMY_PREFIX
        )
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error})") from error
    return model.encode, {i: model.id_to_piece(i) for i in range(model.get_piece_size())}


def _read_tokenizer_json(path: Path, convention: Convention) -> tuple[Encode, dict[int, str]]:
    """Read the same from a `tokenizer.json`, ignoring its added tokens.

    For the slow convention its normalizer is replaced by one that adds no prefix, which makes its
    ids those of `tokenizer.model`.
    """
    description = read_json_object(path)
    description["added_tokens"] = []
    if convention == "slow":
        description["normalizer"] = {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": SPACE,
        }
    try:
        model = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path} is not a valid tokenizer description ({error})") from error

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return encode, {token_id: piece for piece, token_id in model.get_vocab().items()}


def _text(entry: str | Mapping[str, Any]) -> str:
    """The text of a token that a file states as a string or as a description."""
    return entry if isinstance(entry, str) else entry["content"]


def _read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is no such file."""
    return read_json_object(path) if path.exists() else {}
