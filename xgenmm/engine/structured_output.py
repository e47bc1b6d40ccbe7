"""Structured output: from a JSON schema to a mask of the tokens that may come next.

Knows nothing about models, requests or sampling. llguidance does the parsing. This module gives it
the bytes of each token as `Detokenizer` renders them, and schemas that another process has found
enforceable and cheap enough. Masks are computed in threads of their own, so that a schema whose
masks are slow delays only its own answer.

A number stops after 15 characters if it may: more are not exact in most JSON parsers.
"""

import json
import os
import re
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from operator import attrgetter
from typing import Any

import cachetools
import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from xgenmm.engine.json_schema import PARSER_LIMITS, SchemaLimits, cannot_enforce
from xgenmm.engine.schema_process import (
    NICENESS,
    STACK_BYTES,
    CheckedSchema,
    SchemaProcess,
    Vocabulary,
)
from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Tokenizer

MAX_SCHEMAS = 128
"""Schemas whose check is remembered."""

MAX_MASK_THREADS = 4
BUILD_THREADS = 2

_NUMBER = frozenset(b"0123456789+-.eE")
_MAX_NUMBER_LENGTH = 15
_QUOTED = 60  # bytes of an answer in an error message


class GrammarCompiler:
    """Compiles JSON schemas for one checkpoint's tokenizer. Thread-safe.

    Each schema is checked once as long as it is among the recent ones. The grammar is compiled for
    each answer, because the lexer's states belong to one answer's limits.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        vocab: int,
        limits: SchemaLimits | None = None,
    ) -> None:
        """`vocab` is the width of the logits; each of `end_ids` may end an answer."""
        self.end_ids = sorted(end_ids)
        self.texts = texts = [tokenizer.text_bytes(token) for token in range(vocab)]
        self.limits = limits = limits or SchemaLimits()
        vocabulary = Vocabulary(texts, self.end_ids)
        self._tokenizer = vocabulary.tokenizer()
        self._process = SchemaProcess(vocabulary, limits)
        self.mask_threads = _thread_pool(max(2, min(MAX_MASK_THREADS, os.cpu_count() or 1)))
        self._build_threads = _thread_pool(BUILD_THREADS)
        self._checked: cachetools.LRUCache[str, CheckedSchema] = cachetools.LRUCache(MAX_SCHEMAS)
        self._condition = threading.Condition()
        # [vocab]
        self.lengthens_number = torch.tensor([bool(_NUMBER & {*text[:1]}) for text in texts])

    def compile(self, schema: Mapping[str, Any]) -> "Grammar":
        """The grammar of one answer.

        Raises InputError if `schema` is not a JSON schema (of the draft that `$schema` names, by
        default 2020-12), exceeds one of the limits, or cannot be enforced in a part.
        """
        grammar, refusal = self._check(_compact_json(schema, self.limits))
        if refusal:
            raise InputError("json_schema", refusal)

        def build() -> LLMatcher:
            return LLMatcher(self._tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)

        answer = Grammar(self, self._build_threads.submit(build).result())
        wait([answer.computation])  # here rather than in the engine's thread
        return answer

    def close(self) -> None:
        """End the process that checks schemas; it starts again if it is needed."""
        self._process.close()

    @cachetools.cachedmethod(attrgetter("_checked"), condition=attrgetter("_condition"))
    def _check(self, text: str) -> CheckedSchema:
        return self._process.check(text)


class Grammar:
    """The state of one answer's grammar. For one thread at a time."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher) -> None:
        """Use `GrammarCompiler.compile`."""
        self._compiler, self._matcher, self._text = compiler, matcher, b""
        self.computation: Future[Tensor] = compiler.mask_threads.submit(self._allowed)

    @property
    def ready(self) -> bool:
        """Whether `finished` and `mask` have nothing to wait for."""
        return self.computation.done()

    @property
    def finished(self) -> bool:
        """Whether the JSON is complete and only an end token can follow."""
        wait([self.computation])
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self) -> Tensor:
        """The tokens allowed next: bool [vocab] on the CPU, end ids only where the JSON may end.

        Raises InputError if the schema allows no continuation of the text so far, or it would take
        too long to find one.
        """
        return self.computation.result()

    def advance(self, token: int) -> None:
        """Append a token and begin to compute the next mask.

        Raises ValueError if the mask does not allow the token.
        """
        if not self.mask()[token]:
            raise ValueError(f"token {token} is not allowed after {self._text!r}")
        self.computation = self._compiler.mask_threads.submit(self._advance, token)

    def _advance(self, token: int) -> Tensor:
        self._matcher.consume_token(token)
        self._text += self._compiler.texts[token]
        return self._allowed()

    def _allowed(self) -> Tensor:
        allowed = torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0)
        if self._matcher.is_error():
            raise self._failure()
        # If nothing can follow, llguidance allows an end token even in the middle of the JSON.
        allowed[self._compiler.end_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise self._failure()
        tail = self._text[-_MAX_NUMBER_LENGTH:]
        if len(tail) == _MAX_NUMBER_LENGTH and _NUMBER.issuperset(tail) and not self._in_string():
            shorter = allowed & ~self._compiler.lengthens_number
            return shorter if shorter.any() else allowed
        return allowed

    def _failure(self) -> InputError:
        """Why there is no mask."""
        error = self._matcher.get_error().partition("\n")[0]
        end = repr(self._text[-_QUOTED:].decode(errors="replace"))
        if not error or error.startswith("NoExtension"):
            return cannot_enforce("$", f"nothing can follow {end}")
        return cannot_enforce("$", f"it is too complex after {end} ({error})")

    def _in_string(self) -> bool:
        return re.sub(rb"\\.", b"", self._text).count(b'"') % 2 == 1


def _thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that can compile what a schema process can, and that make way for the model's."""
    pool = ThreadPoolExecutor(threads, "xgenmm-grammar", _lower_priority)
    started = threading.Barrier(threads)
    default = threading.stack_size(2 * STACK_BYTES)
    wait([pool.submit(started.wait) for _ in range(threads)])
    threading.stack_size(default)
    return pool


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _compact_json(schema: Mapping[str, Any], limits: SchemaLimits) -> str:
    """A schema as compact JSON. Stops at the first excess, so that no schema takes long.

    Raises InputError if a limit is exceeded or `schema` is not a JSON object.
    """
    values = length = 0
    stack: list[tuple[Any, int]] = [(schema, 0)]
    while stack:
        value, depth = stack.pop()
        values += 1
        if isinstance(value, str):
            length += len(value)
        elif isinstance(value, Mapping | list | tuple):
            _check_limit("values", values + len(stack) + len(value), limits.values)
            _check_limit("nested objects and lists", depth + 1, limits.depth)
            nested = value
            if isinstance(value, Mapping):
                length += sum(len(str(name)) for name in value)
                nested = [*value.values()]
            stack.extend((item, depth + 1) for item in nested)
        _check_limit("characters", length, limits.length)
    try:
        text = json.dumps({**schema}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError) as problem:
        raise InputError("json_schema", f"must be a JSON schema as an object ({problem})") from None
    _check_limit("characters", len(text), limits.length)
    return text


def _check_limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise InputError(
            "json_schema",
            f"has {count} {what} or more; at most {limit} are allowed; make it simpler",
        )
