"""Structured answers: a JSON schema in, the tokens that an answer may go on with out.

Knows nothing of models, requests or sampling. The grammar is llguidance's work. Here are the
tokens as the bytes that `Detokenizer` makes of them, the check that no part of a schema goes
unenforced, and what brings an answer to its end before its tokens run out.

An answer is JSON on one line, with at most one space after a comma or a colon, and with the
properties in the schema's order. A number ends after 15 characters where it may: a double holds
that many digits, so that whoever reads it finds an exclusive bound kept.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jsonschema import Draft7Validator, Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Tokenizer

# llguidance refuses those of these that it cannot enforce, but passes over any other keyword.
_KEYWORDS = {*Draft7Validator.META_SCHEMA["properties"]} | {
    *("$anchor", "$defs", "deprecated", "id", "prefixItems", "writeOnly")
}
_LISTS_OF_PARTS = {"allOf", "anyOf", "oneOf", "items", "prefixItems"}
_NAMED_PARTS = {"$defs", "definitions", "patternProperties", "properties"}

# The space is the one that `Detokenizer` drops from the front of an answer. Without `no_forcing`
# the library would choose the tokens of what is certain to come, and need the encoder for it.
_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: " "? json\njson: %json '
_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No `\u`: "\u0061" would be a second name for the property "a".
    "json_allowed_escapes": 'nrbtf\\"',
}
_NUMBER = frozenset(b"0123456789+-.eE")
_LONGEST_NUMBER = 15
_LONGEST_WAY_OUT = 256
_SLACK = 8  # what a name such as `false` can add to a way out


class GrammarCompiler:
    """Compiles JSON schemas for one checkpoint's tokenizer. Threads may share it."""

    def __init__(self, tokens: Tokenizer, end_ids: Collection[int], vocab: int) -> None:
        """`vocab` is the width of the logits; each of `end_ids` ends an answer."""
        self.ends = sorted(end_ids)
        self.texts = texts = [tokens.text_bytes(token) for token in range(vocab)]
        pieces = SimpleNamespace(tokens=texts, eos_token_id=self.ends[0], bos_token_id=None)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(pieces), eos_token=self.ends, slices=LLTokenizer.json_slices()
        )
        # All [vocab]; calm tokens begin no member and no item, flat ones no object and no array.
        self.lengthens_number = torch.tensor([bool(_NUMBER & {*text[:1]}) for text in texts])
        self.calm = torch.tensor([not {*b'[{,"'} & {*text} for text in texts])
        self.flat = torch.tensor([not {*b"[{"} & {*text} for text in texts])
        self.closes = torch.tensor([bool(text) and not text.strip(b"]}") for text in texts])
        self.calm_in_string = torch.tensor([not t.partition(b'"')[2].strip(b"]}") for t in texts])
        self.length = torch.tensor([float(len(text)) for text in texts])
        self.rank = torch.tensor([_rank(text) for text in texts])
        self.rank_inside = torch.tensor([_rank_inside(text) for text in texts])
        self.rank[self.ends] = 1e9

    def compile(self, schema: Mapping[str, Any]) -> "Grammar":
        """A constraint for one answer.

        Raises InputError for what is no JSON schema (in the draft that `$schema` names, by default
        2020-12), and for one with a part that cannot be enforced.
        """
        schema = _checked(schema)
        text = json.dumps(schema | {"x-guidance": _STYLE})
        matcher = LLMatcher(
            self._tokenizer, LLMatcher.grammar_from_lark(_GRAMMAR + text), log_level=0
        )
        # What may come with one token is about an array's item, with its names as in the schema.
        constraint = Grammar(self, matcher, reserve=len(json.dumps(schema)) // 4)
        constraint.way_out(_LONGEST_WAY_OUT)  # raises for a part that no text can meet
        return constraint


class Grammar:
    """What one answer may still become. For one thread at a time.

    `cut` tells that the end of the tokens, not the model, has begun to shape the answer.
    """

    def __init__(
        self, grammars: GrammarCompiler, matcher: LLMatcher, reserve: int = 0, text: bytes = b""
    ) -> None:
        """Made by `GrammarCompiler.compile`; `reserve`: see `mask`."""
        self.cut = False
        self._grammars, self._matcher, self._reserve, self._text = grammars, matcher, reserve, text
        self._look_at: float = float("inf")  # how many tokens are left at the next look for a way
        self._way_out: list[int] = []  # once there is no other way

    @property
    def finished(self) -> bool:
        """The JSON is whole, and only an end can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, left: int | None = None) -> Tensor:
        """The tokens allowed next: bool [vocab] on the CPU, the end ids just where JSON may end.

        left: how many tokens may still come, the end among them. When these are the way out and a
            reserve, no member and no item is begun that need not be; when they are the way out,
            it is taken. So the JSON becomes whole unless the limit is too small for any, or
            `way_out` fails.

        Raises InputError when the schema has led to where no text can follow.
        """
        allowed = self._allowed()
        if left is None:
            return allowed
        if left <= self._look_at and not self._way_out:
            self._look(left)
        if self._way_out:
            return torch.zeros_like(allowed).index_fill_(0, torch.tensor(self._way_out[:1]), True)
        return self._calm(allowed) if self.cut else allowed

    def advance(self, token: int) -> None:
        """The answer goes on with `token`, one that the mask allowed."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed after {self._text!r}")
        self._text += self._grammars.texts[token]
        self._way_out = self._way_out[1:]

    def way_out(self, limit: int) -> list[int]:
        """A short way to whole JSON, at most `limit` tokens, the last an end; empty if none.

        Greedy: it closes what it may and begins what it has to. It is not always the shortest,
        and a long pattern may keep it from an end.
        """
        tables = self._grammars
        probe = Grammar(tables, self._matcher.deep_copy(), text=self._text)
        rank_inside, way = tables.rank_inside.clone(), list[int]()
        while len(way) < limit:
            allowed = probe._allowed()
            if allowed[tables.ends[0]]:
                return [*way, tables.ends[0]]
            rank = tables.rank
            if probe._in_string():
                certain = probe._matcher.compute_ff_bytes()  # then the fewest tokens for it
                rank = tables.length if certain else rank_inside
            way.append(int(rank.masked_fill(~allowed, -1).argmax()))
            rank_inside[way[-1]] /= 2  # so that a pattern like `a*b` does not keep it for ever
            probe.advance(way[-1])
        return []

    def _look(self, left: int) -> None:
        """See how far the end is. That takes as many masks as the way out has tokens."""
        way = self.way_out(min(left, _LONGEST_WAY_OUT))
        spare = left - len(way) - _SLACK
        if way and spare <= 0:
            self._way_out = way
        self.cut = bool(way) and spare <= self._reserve
        until = left if not way else spare if self.cut else spare - self._reserve
        self._look_at = left - 1 - max(0, until) // 2

    def _calm(self, allowed: Tensor) -> Tensor:
        """Of the allowed tokens those that begin nothing, or begin least."""
        tables = self._grammars
        if self._in_string():
            return allowed & tables.calm_in_string
        calm = allowed & (tables.calm if (allowed & tables.closes).any() else tables.flat)
        return calm if calm.any() else allowed

    def _allowed(self) -> Tensor:
        allowed = torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0)
        # Where nothing can follow, the library allows an end even in mid-JSON.
        allowed[self._grammars.ends] = self._matcher.is_accepting()
        if not allowed.any():
            raise _refused("$", f"nothing can follow {self._text.decode(errors='replace')!r}")
        tail = self._text[-_LONGEST_NUMBER:]
        if len(tail) == _LONGEST_NUMBER and _NUMBER.issuperset(tail) and not self._in_string():
            shorter = allowed & ~self._grammars.lengthens_number
            return shorter if shorter.any() else allowed
        return allowed

    def _in_string(self) -> bool:
        return re.sub(rb"\\.", b"", self._text).count(b'"') % 2 == 1


def _rank(text: bytes) -> float:
    """How soon a token leads to the end when it stands outside of a string."""
    if text and not text.strip(b"]}"):
        return 1e6 + len(text)
    # 0 comes last because a bound may exclude it; then true, false and null; arrays and objects.
    if len(text) == 1 and (place := b',:"1234567890'.find(text)) >= 0:
        return 1000.0 - place
    if text.isalpha():
        return 100.0 + len(text)
    return 1.0 if text.strip()[:1] in (b"[", b"{") else 10.0


def _rank_inside(text: bytes) -> float:
    """The same inside of a string: the end, or a character that a pattern may be waiting for."""
    if text == b'"':
        return 1e6
    return 20.0 if len(text) == 1 and text.isascii() and text != b"\\" else 1.0


def _checked(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as plain JSON; InputError for what is no schema and for what is not enforced."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps({**schema}, allow_nan=False))
        draft = validator_for(plain, default=Draft202012Validator)
        error = best_match(draft(draft.META_SCHEMA).iter_errors(plain))
        parts = list(_parts(plain, "$"))
    except (AttributeError, TypeError, ValueError, RecursionError) as problem:
        raise InputError("json_schema", f"must be a JSON schema as an object ({problem})") from None
    if error is not None:
        raise InputError("json_schema", f"is no valid schema at {error.json_path}: {error.message}")
    for path, part in parts:
        if reason := _passed_over(part):
            raise _refused(path, reason)
    if reason := _refusal(plain):
        # At the smallest part that llguidance refuses for the same reason.
        shared = {name: plain[name] for name in ("$defs", "definitions") if name in plain}
        where = (path for path, part in reversed(parts) if _refusal(part | shared) == reason)
        raise _refused(next(where, "$"), reason)
    return plain


def _parts(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and every schema within it, with the paths to them."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        within: list[tuple[str, Any]] = []
        if keyword in _NAMED_PARTS and isinstance(value, dict):
            within = [(f".{name}", part) for name, part in value.items()]
        elif keyword in _LISTS_OF_PARTS and isinstance(value, list):
            within = [(f"[{i}]", part) for i, part in enumerate(value)]
        elif keyword in ("additionalItems", "additionalProperties", "items"):
            within = [("", value)]
        for name, part in within:
            yield from _parts(part, f"{path}.{keyword}{name}")


def _passed_over(part: dict[str, Any]) -> str:
    """What llguidance would accept in a part but not enforce to the full; empty for nothing."""
    if unknown := [key for key in part if key not in _KEYWORDS and not key.startswith("x-")]:
        return f"keyword {unknown[0]!r}; correct it or leave it out"
    if "format" in part and "string" not in part.get("type", "string"):
        return f"format {part['format']!r} of no string; use minimum, maximum or multipleOf"
    if part.get("minProperties", 0) > len(part.get("required", ())) + 1:
        # Nothing keeps two members that the schema does not name from having the same name.
        return "minProperties beyond one more than in `required`; name more of them there"
    if part.get("multipleOf", 1) % 1:
        # Validators divide floating-point numbers: to them 0.07 is no multiple of 0.01.
        return f"multipleOf {part['multipleOf']}; use a whole number"
    values = json.dumps([part.get("const"), part.get("enum")], ensure_ascii=False)
    if re.search(r"\\u00|\x7f", values.replace(r"\\", "")):
        # Only `\u` could write them, see `_STYLE`, and llguidance would leave them out.
        return r"control characters in const or enum; use none but \b, \f, \n, \r and \t"
    return ""


def _refusal(schema: dict[str, Any]) -> str:
    """Why llguidance refuses a schema; empty when it does not."""
    grammar = LLMatcher.grammar_from_json_schema(schema | {"x-guidance": _STYLE})
    refused, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if refused and messages[0].startswith("oneOf"):
        return "oneOf with alternatives that may overlap; use anyOf"
    return messages[0] if refused else ""


def _refused(path: str, reason: str) -> InputError:
    return InputError("json_schema", f"cannot be enforced at {path}: {reason}")
