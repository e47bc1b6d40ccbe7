"""Which JSON schemas can be enforced, and how they are given to llguidance.

Knows nothing about tokens or models and imports no torch: `schema_process` runs it in a process of
its own, because neither jsonschema nor llguidance bounds the time and memory that it may take.

The grammar of a schema is JSON on one line, with at most one space after a comma or a colon and
with properties in the schema's order. Its numbers are those that every JSON parser keeps apart:
integers have at most 53 bits, and an exclusive bound becomes an inclusive one a little further in.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft3Validator, Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLParserLimits

from xgenmm.errors import InputError, printable

Schema = dict[str, Any]

# Keywords that llguidance enforces, and those that do not restrict a document.
_KEYWORDS = {
    *("$ref", "allOf", "anyOf", "const", "enum", "oneOf", "type"),
    *("additionalItems", "items", "maxItems", "minItems", "prefixItems"),
    *("additionalProperties", "maxProperties", "minProperties", "patternProperties"),
    *("properties", "required", "format", "maxLength", "minLength", "pattern"),
    *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
    *("$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType"),
    *("default", "definitions", "deprecated", "description", "examples", "id", "readOnly"),
    *("title", "writeOnly"),
}
_SCHEMA_LISTS = {"allOf", "anyOf", "oneOf", "items", "prefixItems"}
_SCHEMA_MAPS = {"$defs", "definitions", "patternProperties", "properties"}
_MINIMUM_COUNTS = {"minItems", "minLength", "minProperties"}
_COUNTS = {*_MINIMUM_COUNTS, "maxItems", "maxLength", "maxProperties"}

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
PARSER_LIMITS = LLParserLimits(
    # So a mask takes about 5 ms at most and the lexer of an answer 100 MB.
    max_items_in_row=5_000,
    step_lexer_fuel=50_000,
    step_max_items=5_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)

_LARGEST = 2**53 - 1  # larger integers are not exact in most JSON parsers
_FINEST = 1e-15
_LARGEST_MULTIPLE = 1_000
_MAX_ERRORS = 20  # a schema may have as many as parts
_SEARCH_SECONDS = 0.3  # for the part of a schema that llguidance rejects
_PATH_LENGTH, _REASON_LENGTH = 200, 300  # in characters of an error message


@dataclass(frozen=True)
class SchemaLimits:
    """What a schema may take. The defaults are generous for real ones of up to 64 kB.

    length: characters as compact JSON. values: objects, lists, texts and so on in it.
    depth: of nested objects and lists. pattern: characters of a regular expression.
    repeat: a count in a regular expression, and minItems, minLength and minProperties.
    seconds: of a CPU, to check it. memory: bytes, to check it.
    """

    length: int = 128 << 10
    values: int = 20_000
    depth: int = 100
    pattern: int = 8_000
    repeat: int = 10_000
    seconds: float = 2.0
    memory: int = 256 << 20


def lark_grammar(schema: Schema) -> str:
    """The grammar of an enforceable schema, in the form that llguidance takes."""
    text = json.dumps(schema | {"x-guidance": _STYLE}, ensure_ascii=False)
    return LLMatcher.grammar_from_lark(_GRAMMAR + text)


def enforceable(text: str | bytes, limits: SchemaLimits) -> Schema:
    """A schema that llguidance enforces fully, and whose documents all conform to the one given.

    text: the schema as JSON.

    Raises InputError if it is not a JSON schema (of the draft that `$schema` names, by default
    2020-12), exceeds a limit, or has a part that cannot be enforced.
    """
    schema: Schema = json.loads(text)
    draft = validator_for(schema, default=Draft202012Validator)
    draft = Draft202012Validator if draft is Draft3Validator else draft
    error = best_match(islice(draft(draft.META_SCHEMA).iter_errors(schema), _MAX_ERRORS))
    if error is not None:
        path = printable(error.json_path, _PATH_LENGTH)
        message = printable(error.message, _REASON_LENGTH)
        raise InputError("json_schema", f"is not a valid schema at {path}: {message}")
    parts, multiple = list(_parts(schema, "$")), 1
    targets = {id(part) for _, part in parts}
    refers = any("$ref" in part for _, part in parts)
    for path, part in parts:
        multiple = math.lcm(multiple, max(1, int(part.get("multipleOf", 1))))
        if reason := (
            _unenforced(part)
            or _exceeded(part, limits)
            or (refers and _uncertain_reference(part, schema, targets))
            or _uncertain_multiple(part, multiple)
            or _round_bounds(part)
        ):
            raise cannot_enforce(path, reason)
        for keyword in _COUNTS & part.keys():
            part[keyword] = int(part[keyword])  # from 3.0, which llguidance rejects
    if reason := _rejection(schema):
        raise cannot_enforce(_rejected_path(schema, reason), reason)
    return schema


def cannot_enforce(path: str, reason: str) -> InputError:
    """The error for a part of a schema; long texts are cut."""
    path, reason = printable(path, _PATH_LENGTH), printable(reason, _REASON_LENGTH)
    return InputError("json_schema", f"cannot be enforced at {path}: {reason}")


def _parts(schema: Any, path: str) -> Iterator[tuple[str, Schema]]:
    """The path and content of a schema and of every schema within it."""
    if isinstance(schema, dict):
        yield path, schema
        for nested_path, nested in _children(schema, path):
            yield from _parts(nested, nested_path)


def _children(schema: Schema, path: str) -> Iterator[tuple[str, Any]]:
    for keyword, value in schema.items():
        if keyword in _SCHEMA_MAPS and isinstance(value, dict):
            for name, part in value.items():
                yield f"{path}.{keyword}.{name}", part
        elif keyword in _SCHEMA_LISTS and isinstance(value, list):
            for i, part in enumerate(value):
                yield f"{path}.{keyword}[{i}]", part
        elif keyword in ("additionalItems", "additionalProperties", "items"):
            yield f"{path}.{keyword}", value


def _unenforced(part: Schema) -> str:
    """What llguidance accepts in a part but does not fully enforce; empty if nothing."""
    if unknown := [key for key in part if key not in _KEYWORDS and not key.startswith("x-")]:
        return f"keyword {unknown[0]!r} is not supported; correct it or leave it out"
    if "additionalItems" in part and "prefixItems" in part:
        return "additionalItems beside prefixItems; use items"
    if "format" in part and "string" not in part.get("type", "string"):
        return (
            f"format {part['format']!r} for a type other than string; use minimum, maximum or "
            "multipleOf"
        )
    if part.get("minProperties", 0) > len(part.get("required", ())) + 1:
        # llguidance does not prevent two members with the same unnamed key.
        return "minProperties beyond one more than in `required`; name more of them there"
    values = [part.get("const"), part.get("enum")]
    if any(abs(number) > _LARGEST for number in _numbers(values)):
        return f"a number beyond {_LARGEST} in const or enum; most JSON parsers round it"
    text = json.dumps(values, ensure_ascii=False)
    if re.search(r"\\u00|\x7f", text.replace(r"\\", "")):
        # They need `\u`, which `_STYLE` excludes; llguidance would silently drop the value.
        return r"control characters in const or enum; use none but \b, \f, \n, \r and \t"
    return ""


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for nested in value.values() if isinstance(value, dict) else value:
            yield from _numbers(nested)
    elif isinstance(value, int | float):
        yield value


def _exceeded(part: Schema, limits: SchemaLimits) -> str:
    """Which limit a pattern or a count exceeds; empty if none does."""
    patterns = [part["pattern"]] if "pattern" in part else []
    for pattern in [*patterns, *part.get("patternProperties", ())]:
        if len(pattern) > limits.pattern:
            return f"a pattern of {len(pattern)} characters; at most {limits.pattern} are allowed"
        for count in re.findall(r"\d+", " ".join(re.findall(r"\{[\d, ]*\}", pattern))):
            if len(count) > 9 or int(count) > limits.repeat:
                return f"a repeat of {count} in a pattern; at most {limits.repeat} is allowed"
    for keyword in _COUNTS & part.keys():
        # A high maximum costs nothing.
        largest = limits.repeat if keyword in _MINIMUM_COUNTS else _LARGEST
        if part[keyword] > largest:
            return f"{keyword} {part[keyword]}; at most {largest} is allowed"
    return ""


def _uncertain_reference(part: Schema, schema: Schema, targets: set[int]) -> str:
    """Why it is unknown what a part refers to; empty if it is one of `targets`, by `id`."""
    if part is not schema and not {"$id", "id"}.isdisjoint(part):
        return "$id within another schema, in one that has $ref; leave it out"
    reference = part.get("$ref", "#")
    target: Any = schema
    for name in unquote(reference).removeprefix("#").split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            target = target.get(key) if isinstance(target, dict) else None
    if reference[:1] != "#" or not (id(target) in targets or isinstance(target, bool)):
        return f"$ref {reference!r}; refer to a part of the schema, such as #/$defs/name"
    return ""


def _uncertain_multiple(part: Schema, multiple: int) -> str:
    """Why a multipleOf cannot be enforced; `multiple`: of it and of all before."""
    if part.get("multipleOf", 1) % 1:
        # Validators divide floating-point numbers: for them, 0.07 is not a multiple of 0.01.
        return f"multipleOf {part['multipleOf']}; use a whole number"
    if multiple > _LARGEST_MULTIPLE:
        # The lexer has a state for each remainder, and parts may be merged.
        return (
            f"multipleOf {part['multipleOf']}; the least common multiple of all of them must be at "
            f"most {_LARGEST_MULTIPLE}"
        )
    return ""


def _round_bounds(part: Schema) -> str:
    """Replace a part's bounds by inclusive ones that no JSON parser rounds away.

    Multiples always get bounds, because any number of digits may precede the one that completes
    them. Returns why bounds cannot be enforced; empty if they can.
    """
    types = part.get("type", "number")
    integer = "integer" in types and "number" not in types
    bounded = "multipleOf" in part
    low = _lower_bound(part.pop("minimum", None), part.pop("exclusiveMinimum", None), integer)
    high = -_lower_bound(
        _negative(part.pop("maximum", None)), _negative(part.pop("exclusiveMaximum", None)), integer
    )
    if low > _LARGEST or high < -_LARGEST:
        return f"its bounds exclude all numbers up to {_LARGEST}; most JSON parsers round others"
    if bounded or low > -math.inf:
        part["minimum"] = max(low, -_LARGEST)
    if bounded or high < math.inf:
        part["maximum"] = min(high, _LARGEST)
    return ""


def _negative(bound: float | None) -> float | None:
    return bound if bound is None or isinstance(bound, bool) else -bound


def _lower_bound(inclusive: float | None, exclusive: float | None, integer: bool) -> float:
    """The inclusive bound, -inf for none; in draft 4, `exclusive` says whether `inclusive` is."""
    if isinstance(exclusive, bool):
        inclusive, exclusive = (None, inclusive) if exclusive else (inclusive, None)
    bounds = [-math.inf]
    if inclusive is not None and integer:
        bounds.append(math.ceil(inclusive))
    elif inclusive is not None:
        bounds.append((_FINEST if inclusive > 0 else 0) if abs(inclusive) < _FINEST else inclusive)
    if exclusive is not None and integer:
        bounds.append(math.floor(exclusive) + 1)
    elif exclusive is not None and abs(exclusive) > _LARGEST:
        bounds.append(exclusive)
    elif exclusive is not None:
        step = Fraction(10) ** math.ceil(math.log10(max(_FINEST, math.ulp(exclusive))))
        bounds.append(float((Fraction(exclusive) // step + 2) * step))
    return max(bounds)


def _rejection(schema: Schema) -> str:
    """Why llguidance rejects a schema; empty if it does not."""
    grammar = LLMatcher.grammar_from_json_schema(schema | {"x-guidance": _STYLE})
    rejected, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=PARSER_LIMITS)
    if rejected and messages[0].startswith("oneOf"):
        return "oneOf with alternatives that may overlap; use anyOf"
    return messages[0] if rejected else ""


def _rejected_path(schema: Schema, reason: str) -> str:
    """The path of the smallest part found that llguidance rejects for this reason."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    deadline = time.process_time() + _SEARCH_SECONDS
    path, part = "$", schema
    while True:
        # A definition before the parts that refer to it.
        children = sorted(_children(part, path), key=lambda child: "$defs." not in child[0])
        for nested_path, nested in children:
            if time.process_time() > deadline:
                return path
            if isinstance(nested, dict) and _rejection(nested | shared) == reason:
                path, part = nested_path, nested
                break
        else:
            return path
