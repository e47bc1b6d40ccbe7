"""Hostile JSON Schemas, by class of attack.

A case says what must happen: `refuse` (an InputError), `answer` (a document, or the beginning of
one), or `either`, where both are right as long as what is answered follows the schema.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Expected = Literal["refuse", "answer", "either"]

COG_SCHEMA = Path(__file__).resolve().parents[2] / "tests" / "data" / "cog-yaml-schema.json"


@dataclass(frozen=True)
class Case:
    """One schema. `checked`: whether jsonschema can check a document in reasonable time."""

    group: str
    name: str
    schema: Any
    expected: Expected = "refuse"
    checked: bool = True


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested(schema: dict[str, Any], depth: int, keyword: str = "properties") -> dict[str, Any]:
    """A schema within `depth` others."""
    for _ in range(depth):
        if keyword == "properties":
            schema = closed(a=schema)
        elif keyword in ("anyOf", "allOf", "oneOf"):
            schema = {keyword: [schema]}
        else:
            schema = {"type": "array", keyword: schema}
    return schema


def chain(length: int) -> dict[str, Any]:
    """A chain of references."""
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "null"}}}


def text(**keywords: Any) -> dict[str, Any]:
    """The schema of a string."""
    return {"type": "string", **keywords}


def number(**keywords: Any) -> dict[str, Any]:
    """The schema of a number."""
    return {"type": "number", **keywords}


def integer(**keywords: Any) -> dict[str, Any]:
    """The schema of an integer."""
    return {"type": "integer", **keywords}


def names(count: int) -> dict[str, Any]:
    """That many properties."""
    return {f"key{i}": {"type": "integer"} for i in range(count)}


def all_cases() -> Iterator[Case]:
    """Every case, grouped."""
    yield from _size()
    yield from _depth()
    yield from _references()
    yield from _many_keywords()
    yield from _patterns()
    yield from _repeats()
    yield from _numbers()
    yield from _texts()
    yield from _not_schemas()
    yield from _unenforceable()
    yield from _ordinary()


def _size() -> Iterator[Case]:
    group = "size"
    yield Case(group, "const of 1 MB", {"const": {"a": "x" * 1_000_000}}, "either")
    yield Case(group, "const of 10,000 members", {"const": {f"k{i}": i for i in range(10_000)}}, "either")  # fmt: skip # noqa: E501
    yield Case(
        group, "10,000 properties", {"type": "object", "properties": names(10_000)}, "either"
    )
    required = [f"key{i}" for i in range(8_000)]
    yield Case(group, "8,000 required names", {"type": "object", "required": required}, "either")
    yield Case(group, "enum of 100,000", {"enum": list(range(100_000))}, "either")
    yield Case(
        group, "enum of 20,000 texts", {"enum": [f"v{i:05}" for i in range(20_000)]}, "either"
    )
    yield Case(group, "enum of 3,000 texts", {"enum": [f"v{i:05}" for i in range(3_000)]}, "either")
    yield Case(group, "title of 10 MB", {"title": "x" * 10_000_000}, "either")
    yield Case(group, "enum with a text of 60 kB", {"enum": ["x" * 60_000, "y"]}, "either")
    yield Case(group, "name of 60 kB", closed(**{"n" * 60_000: {"type": "null"}}), "either")
    yield Case(group, "20 consts of 3 kB", {"enum": [chr(97 + i) * 3_000 for i in range(20)]}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "1,000,000 empty lists", {"const": [[]] * 1_000_000}, "either")
    yield Case(group, "12,000 nulls", {"const": [None] * 12_000}, "either")
    yield Case(group, "1,900 properties", {"type": "object", "properties": names(1_900)}, "either")
    yield Case(group, "1,300 required properties", closed(**names(1_300)), "either")
    yield Case(group, "default of 1 MB", {"type": "null", "default": "x" * 1_000_000}, "either")
    yield Case(group, "examples of 60 kB", {"type": "null", "examples": ["x" * 60_000]}, "answer")
    yield Case(group, "x- keyword of 5 MB", {"type": "null", "x-a": ["x"] * 1_000_000}, "either")


def _depth() -> Iterator[Case]:
    group = "depth"
    for keyword in ("properties", "items", "anyOf", "allOf", "oneOf", "additionalProperties"):
        for depth in (100, 400, 900):
            name = f"{depth} nested {keyword}"
            yield Case(group, name, nested({"type": "null"}, depth, keyword), "either")
    yield Case(group, "2,000 nested allOf", nested({"type": "null"}, 2_000, "allOf"))
    yield Case(group, "50,000 nested items", nested({"type": "null"}, 50_000, "items"))
    value: Any = None
    for depth in range(1, 100_001):
        value = [value]
        if depth in (60, 200, 900, 100_000):
            yield Case(group, f"const of depth {depth}", {"const": value}, "either")
            yield Case(group, f"x- keyword of depth {depth}", {"x-a": value}, "either")
    yield Case(group, "30 nested properties", nested({"type": "null"}, 12), "answer")


def _references() -> Iterator[Case]:
    group = "references"
    yield Case(group, "chain of 20", chain(20), "answer")
    for length in (300, 1_500, 5_000):
        yield Case(group, f"chain of {length:,}", chain(length), "either", False)
    yield Case(group, "itself", {"$ref": "#"})
    yield Case(group, "circle", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})  # fmt: skip # noqa: E501
    yield Case(group, "endless", {"$ref": "#/$defs/a", "$defs": {"a": closed(a={"$ref": "#/$defs/a"})}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "itself in allOf", {"allOf": [{"$ref": "#"}], "type": "object"})
    tree = {"$defs": {"a": {"type": "object", "properties": {"c": {"$ref": "#/$defs/a"}}}, "b": {"type": "object", "properties": {"c": {"$ref": "#/$defs/b"}}}}}  # fmt: skip # noqa: E501
    yield Case(group, "two trees in allOf", {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], **tree}, "either")  # fmt: skip # noqa: E501
    bomb: dict[str, Any]
    bomb = {"d30": {"type": "null"}}
    for i in range(30):
        bomb[f"d{i}"] = closed(a={"$ref": f"#/$defs/d{i + 1}"}, b={"$ref": f"#/$defs/d{i + 1}"})
    yield Case(group, "doubling in properties", {"$ref": "#/$defs/d0", "$defs": bomb}, "either")
    for keyword in ("allOf", "anyOf", "oneOf"):
        bomb = {"d30": {"type": "object", "properties": {"a": {"type": "null"}}}}
        for i in range(30):
            bomb[f"d{i}"] = {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}  # fmt: skip # noqa: E501
        yield Case(group, f"doubling in {keyword}", {"$ref": "#/$defs/d0", "$defs": bomb}, "either", False)  # fmt: skip # noqa: E501
        siblings = {name: {"type": "object", **part} for name, part in bomb.items()}
        yield Case(group, f"doubling in {keyword} beside type", {"$ref": "#/$defs/d0", "$defs": siblings}, "either", False)  # fmt: skip # noqa: E501
    yield Case(group, "into an annotation", {"$ref": "#/x-a", "x-a": {"uniqueItems": True}})
    yield Case(group, "into a default", {"$ref": "#/default", "default": {"not": {}}})
    for address in ("file:///etc/passwd", "http://169.254.169.254/a", "https://example.org/s", "other.json", "#/a/b", "#a", "urn:x", "//h", "#/%24defs/%ff"):  # fmt: skip # noqa: E501
        yield Case(group, f"to {address!r}", closed(a={"$ref": address}))
    yield Case(group, "to a keyword", {"properties": {"a": {"$ref": "#/required"}}, "required": ["a"]})  # fmt: skip # noqa: E501
    yield Case(group, "to a title", {"title": "x", "properties": {"a": {"$ref": "#/title"}}, "required": ["a"]})  # fmt: skip # noqa: E501
    unknown: dict[str, Any] = {f"d{i}": {"type": "integer"} for i in range(3_000)}
    unknown["d1500"] = {"not": {"type": "null"}}
    yield Case(group, "3,000 $defs, one not enforced", {"$ref": "#/$defs/d1500", "$defs": unknown})
    used = closed(**{f"k{i}": {"$ref": f"#/$defs/d{i}"} for i in range(1_000)})
    yield Case(group, "1,000 $defs that are used", {**used, "$defs": {f"d{i}": closed(a={"type": "integer"}) for i in range(1_000)}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "$id of another document", {"$id": "https://example.org/a", "$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "$dynamicRef", closed(a={"$dynamicRef": "#a"}))


def _many_keywords() -> Iterator[Case]:
    group = "many keywords"
    patterns = {f"^k{i}$": {"type": "integer"} for i in range(1_000)}
    yield Case(group, "1,000 patternProperties", {"type": "object", "patternProperties": patterns}, "either")  # fmt: skip # noqa: E501
    overlapping = {f"^k{i}": {"type": "integer"} for i in range(1_000)}
    yield Case(group, "1,000 overlapping patternProperties", {"patternProperties": overlapping})
    hard = {f"^(a|b)*{c}(a|b){{9}}$": {"type": "integer"} for c in "cdefghijklmnopqrst"}
    yield Case(group, "patternProperties hard to compare", {"type": "object", "patternProperties": hard}, "either")  # fmt: skip # noqa: E501
    unique = {f"k{i}": {"type": "array", "uniqueItems": True} for i in range(3_000)}
    yield Case(group, "uniqueItems in 3,000 properties", {"type": "object", "properties": unique})
    some = {f"k{i}": {"type": "array", "uniqueItems": True} for i in range(1_000)}
    yield Case(group, "uniqueItems in 1,000 properties", {"type": "object", "properties": some})
    for count in (50, 500, 1_500):
        optional = {"type": "object", "properties": names(count), "additionalProperties": False}
        yield Case(group, f"{count:,} optional properties", optional, "answer" if count == 50 else "either")  # fmt: skip # noqa: E501
    yield Case(group, "500 optional and others", {"type": "object", "properties": names(500)}, "either")  # fmt: skip # noqa: E501
    for count in (300, 1_000):
        branches = [closed(k={"const": i}, v={"type": "integer"}) for i in range(count)]
        yield Case(group, f"oneOf of {count:,} objects", {"oneOf": branches}, "either")
        yield Case(group, f"anyOf of {count:,} objects", {"anyOf": branches}, "either")
    yield Case(group, "anyOf of 2,000 texts", {"anyOf": [text(pattern=f"^{i}[a-z]*$") for i in range(2_000)]}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "allOf of 2,000", {"allOf": [integer(minimum=i) for i in range(2_000)]}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "allOf of 300 objects", {"allOf": [{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(300)]}, "either")  # fmt: skip # noqa: E501
    crossed = {"allOf": [{"anyOf": [closed(**{f"k{i}": {"const": j}}) | {"additionalProperties": {}} for j in range(10)]} for i in range(12)]}  # fmt: skip # noqa: E501
    yield Case(group, "allOf of 12 anyOf of 10", crossed, "either")
    yield Case(group, "allOf of 40 patterns", {"allOf": [text(pattern=f"[{chr(97 + i % 26)}]{{{i}}}") for i in range(40)]}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "types repeated in 1,000 properties", {"type": "object", "properties": {f"k{i}": {} for i in range(1_000)}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "300 anyOf of 6 open objects", closed(**{f"k{i}": {"anyOf": [{"type": "object", "properties": {f"p{j}": {}}} for j in range(6)]} for i in range(150)}), "either")  # fmt: skip # noqa: E501
    yield Case(group, "prefixItems of 3,000", {"type": "array", "prefixItems": [{"type": "null"}] * 3_000, "minItems": 3_000}, "either")  # fmt: skip # noqa: E501
    ambiguous = {"anyOf": [{"type": "array", "items": {"anyOf": [text(), text(maxLength=i)]}} for i in range(60)]}  # fmt: skip # noqa: E501
    yield Case(group, "60 arrays that begin alike", ambiguous, "either")
    deep_ambiguous: dict[str, Any] = {"type": "null"}
    for _ in range(12):
        deep_ambiguous = {"anyOf": [{"type": "array", "items": deep_ambiguous}, {"type": "array", "items": deep_ambiguous, "minItems": 1}]}  # fmt: skip # noqa: E501
    yield Case(group, "ambiguous arrays of depth 12", deep_ambiguous, "either")


def _patterns() -> Iterator[Case]:
    group = "patterns"
    long = {
        "^a{100000}$": "repeat of 100,000",
        "^(a{1,100}){1,100}$": "two nested repeats",
        "^((a{1,100}){1,100}){1,100}$": "three nested repeats",
        "^(a*)*$": "star of star",
        "^(a|aa)*$": "ambiguous alternatives",
        "^(a|b|ab)*c$": "more ambiguous alternatives",
        "(.*a){50}": "50 times anything",
        "^(.*a.*b.*c.*){20}$": "20 times three letters",
        "^(a|b)*a(a|b){12}$": "8,192 states",
        "^(a|b)*a(a|b){30}$": "2^31 states",
        "^[^a]*a.{20}$": "dot repeated after a choice",
        ".{500}a.{500}": "two long repeats",
        "a.{0,500}b.{0,500}c": "two long optional repeats",
        "^" + "|".join(f"word{i}" for i in range(5_000)) + "$": "5,000 alternatives",
        "^" + "a?" * 500 + "a" * 500 + "$": "500 optional letters",
        "^" + "(" * 500 + "a" + ")" * 500 + "$": "500 parentheses",
        "^" + "(" * 20_000 + "a" + ")" * 20_000 + "$": "20,000 parentheses",
        "^" + "(a" * 300 + ")*" * 300 + "$": "300 nested stars",
        "[" + "".join(map(chr, range(0x4E00, 0x5E00))) + "]*": "set of 4,096 letters",
        r"^\p{L}{1,500}$": "500 letters of any script",
        r"^(\p{L}|\p{N}|\p{P}){1,200}$": "200 of any class",
        r"^\w{1,64}@\w{1,64}\.\w{1,64}$": "three times 64",
        r"(?i)^[a-z]{1,999}$": "flags",
        r"^(?=a)b$": "look-ahead",
        r"^(?<!a)b$": "look-behind",
        r"^(a)\1$": "back reference",
        r"^\u{1F600}+$": "code point",
        r"^[\x00-\x1f]$": "control characters only",
        r"^[\ud800-\udfff]$": "surrogates",
        "^(": "open group",
        "^[": "open set",
        "^a{2,1}$": "repeat that is empty",
        "^a{99999999999999999999}$": "repeat beyond 64 bits",
        "^(a{0,1000}){0,1000}$": "a million letters",
        "^" + "(ab|cd|ef|gh){0,99}" * 20 + "$": "20 repeats in a row",
        "^" + "".join(f"(?P<n{i}>a)" for i in range(200)) + "$": "200 named groups",
        "^(x+x+)+y$": "catastrophic backtracking",
        "^([a-zA-Z0-9])(([\\-.]|[_]+)?([a-zA-Z0-9]+))*(@){1}[a-z0-9]+[.]{1}(([a-z]{2,3})|([a-z]{2,3}[.]{1}[a-z]{2,3}))$": "email of a catalogue of slow ones",  # noqa: E501
        "$^": "nothing",
        "\\": "a lone backslash",
        "\x00": "null character",
    }
    for pattern, name in long.items():
        yield Case(group, name, closed(a=text(pattern=pattern)), "either")
    yield Case(group, "pattern of 100 kB", text(pattern="^" + "ab" * 50_000 + "$"), "either")
    yield Case(group, "two patterns together", {"allOf": [text(pattern="^(a|b)*a(a|b){9}$"), text(pattern="^(a|b)*b(a|b){11}$")]}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "pattern with lengths", text(pattern="^(ab?c?)*$", minLength=200, maxLength=900), "either")  # fmt: skip # noqa: E501
    yield Case(group, "pattern with format", text(pattern="^.*2024.*$", format="date-time"), "either")  # fmt: skip # noqa: E501
    yield Case(group, "8,192 states in 200 properties", closed(**{f"k{i}": text(pattern=f"^(a|b)*a(a|b){{12}}{i}$") for i in range(200)}), "either")  # fmt: skip # noqa: E501
    yield Case(group, "8,192 states, keys", {"type": "object", "patternProperties": {"^(a|b)*a(a|b){12}$": {}}, "additionalProperties": False}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "anyOf of 100 state machines", {"anyOf": [text(pattern=f"^(a|b)*a(a|b){{{i % 20}}}c{i}$") for i in range(100)]}, "either")  # fmt: skip # noqa: E501


def _repeats() -> Iterator[Case]:
    group = "repeats"
    for size in (100_000, 10**9, 2**64, 10**30):
        yield Case(group, f"minLength {size}", text(minLength=size), "either")
        yield Case(group, f"maxLength {size}", text(maxLength=size), "either")
        yield Case(group, f"minItems {size}", {"type": "array", "minItems": size}, "either")
        yield Case(group, f"maxItems {size}", {"type": "array", "maxItems": size}, "either")
        yield Case(group, f"minProperties {size}", {"type": "object", "minProperties": size})
        yield Case(group, f"maxProperties {size}", {"type": "object", "maxProperties": size}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "maxItems 1,000 of maxItems 1,000", {"type": "array", "maxItems": 1_000, "items": {"type": "array", "maxItems": 1_000, "items": {"type": "null"}}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "100 arrays of 1,000", closed(**{f"k{i}": {"type": "array", "maxItems": 1_000, "minItems": 500, "items": {"type": "null"}} for i in range(100)}), "either")  # fmt: skip # noqa: E501
    yield Case(group, "100 texts of 4,000", closed(**{f"k{i}": text(maxLength=4_000 + i, minLength=2_000) for i in range(100)}), "either")  # fmt: skip # noqa: E501
    yield Case(group, "maxLength 65,535", text(maxLength=65_535), "either")
    yield Case(group, "fractional maxItems", {"type": "array", "maxItems": 1.5})
    yield Case(group, "maxItems 3.0", {"type": "array", "maxItems": 3.0, "items": {"type": "null"}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "minItems above maxItems", {"type": "array", "minItems": 5, "maxItems": 2})
    yield Case(group, "minLength above maxLength", text(minLength=5, maxLength=2))


def _numbers() -> Iterator[Case]:
    group = "numbers"
    divisor: float
    for divisor in (7, 100, 1_000, 1_009, 1_000_003, 2**32, 10**30):
        yield Case(group, f"multipleOf {divisor}", integer(multipleOf=divisor), "either")
        yield Case(group, f"multipleOf {divisor}, number", number(multipleOf=divisor), "either")
    for divisor in (0.1, 1e-300, 0.3333333333333333):
        yield Case(group, f"multipleOf {divisor}", number(multipleOf=divisor))
    yield Case(group, "multipleOf in allOf", {"allOf": [integer(multipleOf=m) for m in (65_536, 65_537, 3)]}, "either")  # fmt: skip # noqa: E501
    bound: float
    for bound in (2**53, 2**63 - 1, 2**63, 2**64, 10**19, 10**30, 10**400, 1e19, 1e300):
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            for sign in (1, -1):
                words = f"{keyword} {sign * bound:.3g}" if bound < 1e300 else f"{keyword} {sign} big"  # fmt: skip # noqa: E501
                yield Case(group, words, integer(**{keyword: sign * bound}), "either")
    for value in (2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30):
        yield Case(group, f"const {value}", {"const": value}, "either")
        yield Case(group, f"enum with {value}", {"enum": [value, 1]}, "either")
    narrow = ((1.0, 1.0000000000000002), (0.1, 0.10000000000000002), (1e16, 1e16 + 2), (-0.0, 5e-324), (1e300, 1.0000000000000001e300))  # fmt: skip # noqa: E501
    for low, high in narrow:
        yield Case(group, f"between {low!r} and {high!r}", number(exclusiveMinimum=low, exclusiveMaximum=high))  # fmt: skip # noqa: E501
        yield Case(group, f"above {low!r}, up to {high!r}", number(exclusiveMinimum=low, maximum=high), "either")  # fmt: skip # noqa: E501
        yield Case(group, f"from {low!r}, below {high!r}", number(minimum=low, exclusiveMaximum=high), "either")  # fmt: skip # noqa: E501
    for bound in (0.1, 1 / 3, 123456.789012345, 1e-7, 5e-324, 1.7976931348623157e308, 0, -0.0, 1e22):  # fmt: skip # noqa: E501
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            yield Case(group, f"{keyword} {bound!r}", number(**{keyword: bound}), "either")
    yield Case(group, "const 1e308", {"const": 1e308}, "either")
    yield Case(group, "const 1e-320", {"const": 1e-320}, "either")
    yield Case(group, "const -0.0", {"const": -0.0}, "either")
    yield Case(group, "500 ranges", closed(**{f"k{i}": number(minimum=i / 7, maximum=i * 1e5 / 3) for i in range(500)}), "either")  # fmt: skip # noqa: E501
    yield Case(group, "200 multiples", closed(**{f"k{i}": integer(multipleOf=i + 700) for i in range(200)}), "either")  # fmt: skip # noqa: E501


def _texts() -> Iterator[Case]:
    group = "texts"
    odd = ("", " ", "é", "\N{PILE OF POO}", "\u202e", "a\u0301", "\ud800", "\x00", "\n", '"', "\\", "$ref", "a/b~c", "__proto__", "\ufeff", "\uffff")  # fmt: skip # noqa: E501
    for name in odd:
        yield Case(group, f"name {name!r}", closed(**{name: {"type": "null"}}), "either")
        yield Case(group, f"const {name!r}", {"const": name}, "either")
        yield Case(group, f"pattern {name!r}", text(pattern=f"^{name}$"), "either")
        yield Case(group, f"keyword {name!r}", {name: 1})
    yield Case(group, "NaN", {"const": float("nan")})
    yield Case(group, "Infinity", integer(maximum=float("inf")))
    yield Case(group, "x-guidance", {"type": "null", "x-guidance": {"lenient": True, "item_separator": "("}}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "lark in a title", {"title": '"\nstart: /.*/\n%llguidance {}', "type": "null"}, "answer")  # fmt: skip # noqa: E501
    yield Case(group, "lark in a const", {"const": '"}\nstart: /.*/\n%import common.WORD'}, "answer")  # fmt: skip # noqa: E501
    for schema in ("http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-03/schema#", "https://json-schema.org/draft/2019-09/schema", "http://169.254.169.254/", "file:///etc/passwd", ""):  # fmt: skip # noqa: E501
        yield Case(group, f"$schema {schema!r}", {"$schema": schema, "type": "null"}, "either")
    yield Case(group, "draft-04 exclusiveMinimum", {"$schema": "http://json-schema.org/draft-04/schema#", **number(minimum=0, exclusiveMinimum=True)}, "either")  # fmt: skip # noqa: E501
    yield Case(group, "long format", text(format="a" * 50_000))


def _not_schemas() -> Iterator[Case]:
    group = "not schemas"
    values: tuple[Any, ...] = ([], "a", 1, None, True, [{}], {"type": 3}, {"type": []}, {"properties": []}, {"properties": {"a": 1}}, {"required": [1]}, {"enum": 1}, {"items": 3}, {"anyOf": []}, {"anyOf": {}}, {"$ref": 1}, {"$schema": 1}, {"pattern": 1}, {"const": {1, 2}}, {1: 2}, {"minLength": "3"}, {"maximum": "1e9"}, {"$defs": []}, {"$id": 3}, {"additionalProperties": 1}, {"required": ["a", "a"]}, {"multipleOf": 0}, {"multipleOf": -2}, {"type": "object", "minProperties": -1})  # fmt: skip # noqa: E501
    for value in values:
        yield Case(group, repr(value)[:60], value)
    errors = {"type": "object", "properties": {f"k{i}": {"type": "word"} for i in range(2_000)}}
    yield Case(group, "2,000 errors", errors)
    yield Case(group, "error in 2,000 anyOf", {"anyOf": [{"type": 3, "items": 3}] * 2_000})


def _unenforceable() -> Iterator[Case]:
    group = "unenforceable"
    null = {"type": "null"}
    parts = {
        "uniqueItems": {"type": "array", "uniqueItems": True},
        "not": {"not": null},
        "if": {"if": null, "then": {"maxLength": 3}},
        "contains": {"contains": null},
        "propertyNames": {"propertyNames": {"maxLength": 3}},
        "dependentRequired": {"dependentRequired": {"a": ["b"]}},
        "dependentSchemas": {"dependentSchemas": {"a": null}},
        "dependencies": {"dependencies": {"a": ["b"]}},
        "unevaluatedProperties": {"unevaluatedProperties": False},
        "unevaluatedItems": {"unevaluatedItems": False},
        "minContains": {"minContains": 2},
        "unknown keyword": {"minLenght": 3},
        "unknown format": text(format="phone"),
        "minProperties": {"type": "object", "minProperties": 4},
        "overlapping oneOf": {"oneOf": [{"type": "string"}, {"maxLength": 3}]},
        "false": {"type": "array", "items": False, "minItems": 1},
    }
    for name, part in parts.items():
        yield Case(group, name, closed(a=part))
        several = {f"k{i}": {"type": "integer"} for i in range(200)}
        yield Case(group, f"{name} among 200", closed(**several, last=part))


def _ordinary() -> Iterator[Case]:
    group = "ordinary (must be answered)"
    item = closed(
        description=text(maxLength=200),
        quantity=integer(minimum=1, maximum=10_000),
        price=number(minimum=0, exclusiveMaximum=1e6),
        currency={"enum": ["EUR", "USD", "GBP"]},
    )
    invoice = closed(
        number=text(pattern="^[A-Z]{2,4}-[0-9]{4,8}$"),
        date=text(format="date"),
        items={"type": "array", "items": item, "minItems": 1, "maxItems": 200},
        total=number(minimum=0),
        notes={"anyOf": [text(maxLength=2_000), {"type": "null"}]},
    )
    yield Case(group, "invoice", invoice, "answer")
    yield Case(group, "anything", {}, "answer")
    yield Case(group, "any object", {"type": "object"}, "answer")
    yield Case(group, "Cog's cog.yaml", _without_unenforceable(COG_SCHEMA), "answer")
    yield Case(group, "form of 40 optional fields", {"type": "object", "properties": {f"field{i}": {"anyOf": [text(), {"type": "null"}], "title": f"Field {i}", "description": "What it means " * 4} for i in range(40)}}, "answer")  # fmt: skip # noqa: E501
    models = {f"Model{i}": {"type": "object", "title": f"Model {i}", "description": "One of many models. " * 3, "properties": {"id": integer(), "name": text(maxLength=255), "kind": {"enum": [f"kind{j}" for j in range(8)]}, "next": {"anyOf": [{"$ref": f"#/$defs/Model{(i + 1) % 80}"}, {"type": "null"}]}, "others": {"type": "array", "items": {"$ref": f"#/$defs/Model{(i * 7) % 80}"}}}, "required": ["id", "name", "kind"], "additionalProperties": False} for i in range(80)}  # fmt: skip # noqa: E501
    yield Case(group, "80 models of an API (48 kB)", {"$ref": "#/$defs/Model0", "$defs": models}, "answer")  # fmt: skip # noqa: E501
    fields = {f"section{i}": closed(**{f"question{j}": {"enum": ["yes", "no", "unknown"]} for j in range(20)}) for i in range(40)}  # fmt: skip # noqa: E501
    yield Case(group, "survey of 800 questions (64 kB)", closed(**fields), "answer")
    yield Case(group, "250 countries", closed(country={"enum": [f"Country number {i}" for i in range(250)]}), "answer")  # fmt: skip # noqa: E501
    yield Case(group, "1,000 labels", {"type": "array", "items": {"enum": [f"label {i:04}" for i in range(1_000)]}, "maxItems": 5}, "answer")  # fmt: skip # noqa: E501
    yield Case(group, "boxes", {"type": "array", "items": closed(label=text(), box={"type": "array", "items": integer(minimum=0, maximum=999), "minItems": 4, "maxItems": 4}), "maxItems": 100}, "answer")  # fmt: skip # noqa: E501
    yield Case(group, "formats", closed(**{name.replace("-", "_"): text(format=name) for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")}), "answer")  # fmt: skip # noqa: E501
    yield Case(group, "GeoJSON point", closed(type={"const": "Point"}, coordinates={"type": "array", "items": number(minimum=-180, maximum=180), "minItems": 2, "maxItems": 3}), "answer")  # fmt: skip # noqa: E501
    yield Case(group, "union of 30 events", {"oneOf": [closed(kind={"const": f"event{i}"}, value=integer()) for i in range(30)]}, "answer")  # fmt: skip # noqa: E501
    yield Case(group, "text of 10 to 5,000", text(minLength=10, maxLength=5_000), "answer")


def _without_unenforceable(path: Path) -> dict[str, Any]:
    """A published schema without the keywords that nobody can enforce while generating."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(one) for one in value]
        if not isinstance(value, dict):
            return value
        dropped = ("uniqueItems", "$id", "not", "if", "then", "else", "dependencies")
        kept = {key: strip(part) for key, part in value.items() if key not in dropped}
        return {"anyOf" if key == "oneOf" else key: part for key, part in kept.items()}

    cleaned: dict[str, Any] = strip(json.loads(path.read_text()))
    return cleaned
