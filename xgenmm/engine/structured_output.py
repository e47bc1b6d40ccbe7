"""Structured output: from a JSON schema to a mask of the tokens that may come next.

Knows nothing about models, requests or sampling. llguidance does the parsing. This module gives it
the bytes of each token as `Detokenizer` renders them, rejects schemas that it would not fully
enforce, and completes the JSON before an answer reaches its token limit.

The output is JSON on one line, with at most one space after a comma or a colon and with properties
in the schema's order. A number stops after 15 characters if it may: a double holds that many
digits, so an exclusive bound still holds after parsing.
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

# llguidance rejects those of these keywords that it cannot enforce, but ignores all others.
_KEYWORDS = {*Draft7Validator.META_SCHEMA["properties"]} | {
    *("$anchor", "$defs", "deprecated", "id", "prefixItems", "writeOnly")
}
_SCHEMA_LISTS = {"allOf", "anyOf", "oneOf", "items", "prefixItems"}
_SCHEMA_MAPS = {"$defs", "definitions", "patternProperties", "properties"}

# `Detokenizer` drops the leading space. Without `no_forcing`, llguidance would choose the tokens of
# text that has no alternative, for which it needs the encoder.
_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: " "? json\njson: %json '
_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # No `\u`: "\u0061" would be a second spelling of the property "a".
    "json_allowed_escapes": 'nrbtf\\"',
}
_NUMBER = frozenset(b"0123456789+-.eE")
_MAX_NUMBER_LENGTH = 15
_MAX_COMPLETION = 256
_SLACK = 8  # tokens that a literal such as `false` can add to a completion


class GrammarCompiler:
    """Compiles JSON schemas for one checkpoint's tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int], vocab: int) -> None:
        """`vocab` is the width of the logits; each of `end_ids` may end an answer."""
        self.end_ids = sorted(end_ids)
        self.texts = texts = [tokenizer.text_bytes(token) for token in range(vocab)]
        vocabulary = SimpleNamespace(tokens=texts, eos_token_id=self.end_ids[0], bos_token_id=None)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), eos_token=self.end_ids, slices=LLTokenizer.json_slices()
        )
        # All [vocab]. A token is `calm` if it begins no member and no item, `flat` if it begins no
        # object and no array.
        self.lengthens_number = torch.tensor([bool(_NUMBER & {*text[:1]}) for text in texts])
        self.calm = torch.tensor([not {*b'[{,"'} & {*text} for text in texts])
        self.flat = torch.tensor([not {*b"[{"} & {*text} for text in texts])
        self.closes = torch.tensor([bool(text) and not text.strip(b"]}") for text in texts])
        self.calm_in_string = torch.tensor([not t.partition(b'"')[2].strip(b"]}") for t in texts])
        self.length = torch.tensor([float(len(text)) for text in texts])
        self.rank = torch.tensor([_rank(text) for text in texts])
        self.rank_inside = torch.tensor([_rank_inside(text) for text in texts])
        self.rank[self.end_ids] = 1e9

    def compile(self, schema: Mapping[str, Any]) -> "Grammar":
        """The grammar of one answer.

        Raises InputError if `schema` is not a JSON schema (of the draft that `$schema` names, by
        default 2020-12) or if a part of it cannot be enforced.
        """
        schema = _checked(schema)
        text = json.dumps(schema | {"x-guidance": _STYLE})
        matcher = LLMatcher(
            self._tokenizer, LLMatcher.grammar_from_lark(_GRAMMAR + text), log_level=0
        )
        # One token may begin an array item, whose length is about that of its schema.
        grammar = Grammar(self, matcher, reserve=len(json.dumps(schema)) // 4)
        grammar.completion(_MAX_COMPLETION)  # raises for a part that no text can satisfy
        return grammar


class Grammar:
    """The state of one answer's grammar. For one thread at a time.

    limited: whether the token limit has begun to restrict the answer, beyond the schema.
    """

    def __init__(
        self, compiler: GrammarCompiler, matcher: LLMatcher, reserve: int = 0, text: bytes = b""
    ) -> None:
        """Use `GrammarCompiler.compile`; `reserve`: see `mask`."""
        self.limited = False
        self._compiler, self._matcher, self._reserve, self._text = compiler, matcher, reserve, text
        self._plan_at: float = float("inf")  # remaining tokens at which to plan the next time
        self._completion: list[int] = []  # the tokens to come, once there is no room for others

    @property
    def finished(self) -> bool:
        """Whether the JSON is complete and only an end token can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, remaining: int | None = None) -> Tensor:
        """The tokens allowed next: bool [vocab] on the CPU, end ids only where the JSON may end.

        remaining: how many tokens may still come, the end token included. When only a completion
            and a reserve fit, no optional member or item may begin; when only a completion fits,
            its tokens are forced. So the JSON is complete unless the limit is too small for any
            answer or `completion` finds none.

        Raises InputError if the schema allows no continuation of the text so far.
        """
        allowed = self._allowed()
        if remaining is None:
            return allowed
        if remaining <= self._plan_at and not self._completion:
            self._plan(remaining)
        if self._completion:
            forced = torch.tensor(self._completion[:1])
            return torch.zeros_like(allowed).index_fill_(0, forced, True)
        return self._calm(allowed) if self.limited else allowed

    def advance(self, token: int) -> None:
        """Append a token that the mask allowed. Raises ValueError for any other."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed after {self._text!r}")
        self._text += self._compiler.texts[token]
        self._completion = self._completion[1:]

    def completion(self, limit: int) -> list[int]:
        """At most `limit` tokens that complete the JSON, an end token last; empty if none is found.

        Greedy: closes what may be closed and begins only what is required. The result is not always
        the shortest, and a long pattern may prevent one.
        """
        compiler = self._compiler
        probe = Grammar(compiler, self._matcher.deep_copy(), text=self._text)
        rank_inside, tokens = compiler.rank_inside.clone(), list[int]()
        while len(tokens) < limit:
            allowed = probe._allowed()
            if allowed[compiler.end_ids[0]]:
                return [*tokens, compiler.end_ids[0]]
            rank = compiler.rank
            if probe._in_string():
                # Text without an alternative should take the fewest tokens.
                forced = probe._matcher.compute_ff_bytes()
                rank = compiler.length if forced else rank_inside
            tokens.append(int(rank.masked_fill(~allowed, -1).argmax()))
            rank_inside[tokens[-1]] /= 2  # so that a pattern like `a*b` comes to an end
            probe.advance(tokens[-1])
        return []

    def _plan(self, remaining: int) -> None:
        """Compare the remaining tokens with a completion, which takes one mask per token."""
        tokens = self.completion(min(remaining, _MAX_COMPLETION))
        spare = remaining - len(tokens) - _SLACK
        if tokens and spare <= 0:
            self._completion = tokens
        self.limited = bool(tokens) and spare <= self._reserve
        until = remaining if not tokens else spare if self.limited else spare - self._reserve
        self._plan_at = remaining - 1 - max(0, until) // 2

    def _calm(self, allowed: Tensor) -> Tensor:
        """The allowed tokens that begin nothing, or else no object and no array."""
        compiler = self._compiler
        if self._in_string():
            return allowed & compiler.calm_in_string
        calm = allowed & (compiler.calm if (allowed & compiler.closes).any() else compiler.flat)
        return calm if calm.any() else allowed

    def _allowed(self) -> Tensor:
        allowed = torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0)
        # If nothing can follow, llguidance allows an end token even in the middle of the JSON.
        allowed[self._compiler.end_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise _cannot_enforce(
                "$", f"nothing can follow {self._text.decode(errors='replace')!r}"
            )
        tail = self._text[-_MAX_NUMBER_LENGTH:]
        if len(tail) == _MAX_NUMBER_LENGTH and _NUMBER.issuperset(tail) and not self._in_string():
            shorter = allowed & ~self._compiler.lengthens_number
            return shorter if shorter.any() else allowed
        return allowed

    def _in_string(self) -> bool:
        return re.sub(rb"\\.", b"", self._text).count(b'"') % 2 == 1


def _rank(text: bytes) -> float:
    """How quickly a token outside of a string leads to complete JSON; higher is quicker."""
    if text and not text.strip(b"]}"):
        return 1e6 + len(text)
    # 0 is the last digit because a bound may exclude it. Then true, false and null, and finally
    # arrays and objects.
    if len(text) == 1 and (place := b',:"1234567890'.find(text)) >= 0:
        return 1000.0 - place
    if text.isalpha():
        return 100.0 + len(text)
    return 1.0 if text.strip()[:1] in (b"[", b"{") else 10.0


def _rank_inside(text: bytes) -> float:
    """The same inside a string: its end, or a character that a pattern may require."""
    if text == b'"':
        return 1e6
    return 20.0 if len(text) == 1 and text.isascii() and text != b"\\" else 1.0


def _checked(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as plain JSON. Raises InputError if it is invalid or cannot be enforced."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps({**schema}, allow_nan=False))
        draft = validator_for(plain, default=Draft202012Validator)
        error = best_match(draft(draft.META_SCHEMA).iter_errors(plain))
        parts = list(_parts(plain, "$"))
    except (AttributeError, TypeError, ValueError, RecursionError) as problem:
        raise InputError("json_schema", f"must be a JSON schema as an object ({problem})") from None
    if error is not None:
        raise InputError(
            "json_schema", f"is not a valid schema at {error.json_path}: {error.message}"
        )
    for path, part in parts:
        if reason := _unenforced(part):
            raise _cannot_enforce(path, reason)
    if reason := _rejection(plain):
        # Name the smallest part that llguidance rejects for the same reason.
        shared = {name: plain[name] for name in ("$defs", "definitions") if name in plain}
        paths = (path for path, part in reversed(parts) if _rejection(part | shared) == reason)
        raise _cannot_enforce(next(paths, "$"), reason)
    return plain


def _parts(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The path and content of a schema and of every schema within it."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        nested: list[tuple[str, Any]] = []
        if keyword in _SCHEMA_MAPS and isinstance(value, dict):
            nested = [(f".{name}", part) for name, part in value.items()]
        elif keyword in _SCHEMA_LISTS and isinstance(value, list):
            nested = [(f"[{i}]", part) for i, part in enumerate(value)]
        elif keyword in ("additionalItems", "additionalProperties", "items"):
            nested = [("", value)]
        for name, part in nested:
            yield from _parts(part, f"{path}.{keyword}{name}")


def _unenforced(part: dict[str, Any]) -> str:
    """What llguidance accepts in a part but does not fully enforce; empty if nothing."""
    if unknown := [key for key in part if key not in _KEYWORDS and not key.startswith("x-")]:
        return f"keyword {unknown[0]!r}; correct it or leave it out"
    if "format" in part and "string" not in part.get("type", "string"):
        return (
            f"format {part['format']!r} for a type other than string; use minimum, maximum or "
            "multipleOf"
        )
    if part.get("minProperties", 0) > len(part.get("required", ())) + 1:
        # llguidance does not prevent two members with the same unnamed key.
        return "minProperties beyond one more than in `required`; name more of them there"
    if part.get("multipleOf", 1) % 1:
        # Validators divide floating-point numbers: for them, 0.07 is not a multiple of 0.01.
        return f"multipleOf {part['multipleOf']}; use a whole number"
    values = json.dumps([part.get("const"), part.get("enum")], ensure_ascii=False)
    if re.search(r"\\u00|\x7f", values.replace(r"\\", "")):
        # They need `\u`, which `_STYLE` excludes; llguidance would silently drop the value.
        return r"control characters in const or enum; use none but \b, \f, \n, \r and \t"
    return ""


def _rejection(schema: dict[str, Any]) -> str:
    """Why llguidance rejects a schema; empty if it does not."""
    grammar = LLMatcher.grammar_from_json_schema(schema | {"x-guidance": _STYLE})
    rejected, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if rejected and messages[0].startswith("oneOf"):
        return "oneOf with alternatives that may overlap; use anyOf"
    return messages[0] if rejected else ""


def _cannot_enforce(path: str, reason: str) -> InputError:
    return InputError("json_schema", f"cannot be enforced at {path}: {reason}")
