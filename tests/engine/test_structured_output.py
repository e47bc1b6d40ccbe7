"""Structured output: whatever a model samples from the mask is JSON that conforms to the schema."""

import json
from decimal import Decimal
from typing import Any

import jsonschema
import psutil
import pytest
import torch

import xgenmm
from tests.support.paths import DEMO
from xgenmm import Request, SamplingParams
from xgenmm.checkpoints.registry import read_config
from xgenmm.engine.json_schema import SchemaLimits
from xgenmm.engine.schema_process import SchemaProcess
from xgenmm.engine.structured_output import Grammar, GrammarCompiler
from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Tokenizer

CONFIG = read_config(DEMO)
TOKENIZER = Tokenizer.from_folder(DEMO, CONFIG.text.convention, CONFIG.additional_ids)
VOCAB = CONFIG.decoder.initial_vocab + CONFIG.decoder.additional_tokens
CLOSES = torch.tensor([not TOKENIZER.text_bytes(i).strip(b'"}]') for i in range(VOCAB)])
END_IDS = {TOKENIZER.id(token) for token in CONFIG.text.stop_tokens}


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def nested_lists(depth: int) -> list[Any]:
    """A list within a list, and so on."""
    return [nested_lists(depth - 1)] if depth > 1 else []


BOX = closed(
    label={"type": "string"},
    box={
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 999},
        "minItems": 4,
    },
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": closed(a=closed(b=closed(c={"type": "string"}), d={"type": "null"})),
    "optional": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "null"}}},
    "enum": closed(colour={"enum": ["red", "light blue", 'a "b" \\', 1.5, None, [True, "é\n"]]}),
    "const": {"const": {"kind": "shapes", "of": [1, None, {"x y": False}]}},
    "array": {"type": "array", "items": BOX, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, BOX], "items": False},
    "numbers": closed(
        share={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        degrees={"type": "number", "minimum": -12.5, "maximum": 1000},
        count={"type": "integer", "minimum": -5, "maximum": 300},
        week={"type": "integer", "multipleOf": 7},
        any={"type": "number"},
    ),
    "strings": closed(
        number={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4,6}$"},
        short={"type": "string", "minLength": 3, "maxLength": 9},
        odd={"type": "string", "pattern": "^[^a-z]\\d.\\S$"},
        date={"type": "string", "format": "date"},
    ),
    "anyOf": {"anyOf": [BOX, {"type": "boolean"}, {"type": ["integer", "null"]}]},
    "oneOf": {"oneOf": [closed(k={"const": 1}, v={"type": "null"}), closed(k={"const": 2})]},
    "allOf": {"allOf": [{"$ref": "#/$defs/x"}, {"required": ["y"]}], "$defs": {"x": closed(y={})}},
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {"node": closed(v={}, c={"type": "array", "items": {"$ref": "#/$defs/node"}})},
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "patterns": {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "string"}},
        "additionalProperties": False,
    },
    "named and other": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    },
    "older draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "items": [{"type": "integer"}, {"$ref": "#/definitions/b"}],
        "definitions": {"b": {"type": "boolean"}},
        "additionalItems": False,
        "type": "array",
    },
    "anything": {"title": "An answer", "x-order": 3},
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """A compiler for the demo checkpoint's tokenizer."""
    return GrammarCompiler(TOKENIZER, END_IDS, VOCAB)


def walk(grammar: Grammar, limit: int, seed: int) -> list[int]:
    """At most `limit` tokens sampled with random logits, without the end token.

    What closes a text, a list or an object becomes ever more likely, so that most documents end.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit and not grammar.finished:
        scores = 3 * torch.randn(VOCAB, generator=generator) + CLOSES * len(ids) / 8
        token = int(scores.masked_fill(~grammar.mask(), -torch.inf).argmax())
        if token in END_IDS:
            break
        grammar.advance(token)
        ids.append(token)
    return ids


def follow(compiler: GrammarCompiler, schema: dict[str, Any], wanted: str) -> str:
    """A number: the wanted characters where they are allowed, and others until it may end."""
    grammar, text = compiler.compile(schema), ""
    while not grammar.finished:
        allowed = grammar.mask()
        if allowed[list(END_IDS)].any() and len(text) >= len(wanted):
            break
        characters = {
            compiler.texts[i].decode(): int(i)
            for i in allowed.nonzero()
            if len(compiler.texts[i]) == 1 and compiler.texts[i] != b" "
        }
        if not characters:
            break
        best = wanted[len(text) : len(text) + 1]
        text += (character := best if best in characters else max(characters))
        grammar.advance(characters[character])
    return text


def accepts(compiler: GrammarCompiler, schema: dict[str, Any], text: str) -> bool:
    """Whether a schema's grammar accepts a whole text, one token per character."""
    grammar = compiler.compile(schema)
    for character in text:
        token = next(i for i in range(VOCAB) if compiler.texts[i] == character.encode())
        if not grammar.mask()[token]:
            return False
        grammar.advance(token)
    return bool(grammar.mask()[list(END_IDS)].all())


@pytest.mark.parametrize("name", SCHEMAS)
def test_output_conforms_to_the_schema(compiler: GrammarCompiler, name: str) -> None:
    for seed in range(4):
        ids = walk(compiler.compile(SCHEMAS[name]), limit=150, seed=seed)
        jsonschema.validate(json.loads(TOKENIZER.decode(ids)), SCHEMAS[name])


@pytest.mark.parametrize("text", ['{"a":1}', ' {"a": 1}', '{"a":-7}'])
def test_space_is_allowed_after_comma_and_colon(compiler: GrammarCompiler, text: str) -> None:
    assert accepts(compiler, closed(a={"type": "integer"}), text)


@pytest.mark.parametrize(
    "text", ['  {"a":1}', '{ "a":1}', '{"a" :1}', '{"a":  1}', '{"a":1 }', '{"a":1} ', "{'a':1}"]
)
def test_other_white_space_is_rejected(compiler: GrammarCompiler, text: str) -> None:
    assert not accepts(compiler, closed(a={"type": "integer"}), text)


def test_property_name_cannot_be_spelled_with_escapes(compiler: GrammarCompiler) -> None:
    schema = SCHEMAS["named and other"]
    assert accepts(compiler, schema, '{"a":1,"b":"x"}')
    assert not accepts(compiler, schema, '{"\\u0061":"x"}')


def test_leading_space_of_the_first_token_is_not_part_of_the_answer(
    compiler: GrammarCompiler,
) -> None:
    grammar = compiler.compile({"type": "integer"})
    prefix = next(
        i for i in range(VOCAB) if TOKENIZER.decode([i, i]) == " " and not TOKENIZER.decode([i])
    )
    assert grammar.mask()[prefix]
    grammar.advance(prefix)
    assert not grammar.mask()[prefix]
    assert TOKENIZER.decode([prefix, *walk(grammar, 20, seed=1)]).strip("-").isdecimal()


def test_special_tokens_only_end_an_answer(compiler: GrammarCompiler) -> None:
    specials = set(TOKENIZER.specials.values())
    grammar = compiler.compile({"type": "string"})
    for token in walk(compiler.compile({"type": "string"}), limit=60, seed=2):
        allowed = {int(i) for i in grammar.mask().nonzero()}
        assert allowed
        assert not allowed & specials
        grammar.advance(token)
    assert grammar.finished
    assert {int(i) for i in grammar.mask().nonzero()} == END_IDS


def test_number_may_continue_up_to_its_maximum_length(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile({"type": "integer"})
    seven = compiler.texts.index(b"7")
    for _ in range(15):
        assert grammar.mask()[seven]
        grammar.advance(seven)
        assert not grammar.finished
    assert {int(i) for i in grammar.mask().nonzero()} == END_IDS
    large = compiler.compile({"type": "integer", "minimum": 10**15})
    assert 10**15 <= json.loads(TOKENIZER.decode(walk(large, 30, seed=3))) < 2**53


BOUNDS = (0, -1, 0.1, 16, 123456.789, -1e-13, 5e-324, 2**53 - 1, 1e308)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", ["number", "integer"])
def test_number_beside_its_bound_conforms_after_parsing(
    compiler: GrammarCompiler, kind: str, bound: float
) -> None:
    """Numbers are steered towards the bound, with more digits than a double holds."""
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        schema = {"type": kind, keyword: bound}
        if bound + (keyword == "exclusiveMinimum") >= 2**53 and keyword.endswith("inimum"):
            with pytest.raises(InputError, match="most JSON parsers round"):
                compiler.compile(schema)
            continue
        digits = f"{Decimal(bound):.40f}"
        for wanted in (digits, digits.rstrip("0"), f"{digits[:20]}9"):
            text = follow(compiler, schema, wanted)
            jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("divisor", [7, 997, 1000])
def test_multiple_comes_to_an_end(compiler: GrammarCompiler, divisor: int) -> None:
    for kind in ("integer", "number"):
        schema = {"type": kind, "multipleOf": divisor}
        number = json.loads(TOKENIZER.decode(walk(compiler.compile(schema), 40, seed=divisor)))
        assert number % divisor == 0
        assert abs(number) < 2**53


def test_byte_tokens_form_whole_characters(compiler: GrammarCompiler) -> None:
    """Only byte tokens may be sampled, above ASCII where the grammar allows it."""
    texts, generator = compiler.texts, torch.Generator().manual_seed(4)
    high = torch.tensor([len(text) == 1 and text[0] >= 0x80 for text in texts])
    grammar, ids = compiler.compile({"type": "string"}), [texts.index(b'"')]
    grammar.advance(ids[0])
    for _ in range(300):
        allowed = grammar.mask() & high
        ids.append(int(torch.rand(VOCAB, generator=generator).masked_fill(~allowed, -1).argmax()))
        grammar.advance(ids[-1])
    text = TOKENIZER.decode(ids + walk(grammar, 20, seed=4))
    assert len(json.loads(text)) > 60
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_grammars_are_independent(compiler: GrammarCompiler) -> None:
    alone = [walk(compiler.compile(BOX), 90, seed) for seed in (5, 6)]
    pair = [compiler.compile(BOX) for _ in alone]
    for tokens in zip(*alone, strict=False):
        for grammar, token in zip(pair, tokens, strict=True):
            assert grammar.mask()[token]
            grammar.advance(token)
    assert alone[0] != alone[1]


def test_token_outside_the_mask_is_rejected(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="is not allowed after"):
        compiler.compile(BOX).advance(compiler.texts.index(b"}"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"maxLength": 3}}, "if"),
        ({"contains": {"type": "null"}}, "contains"),
        ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "minLenght": 3}, "keyword 'minLenght'"),
        ({"type": "string", "nullable": True}, "keyword 'nullable'"),
        ({"type": "string", "format": "phone"}, "Unknown format: phone"),
        ({"type": "integer", "format": "int32"}, "format 'int32' for a type other than string"),
        ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf 0.01; use a whole number"),
        ({"type": "integer", "multipleOf": 1009}, "multipleOf 1009; the least common"),
        ({"type": "integer", "minimum": 2**53}, "most JSON parsers round"),
        ({"enum": [1, {"a": [2**53]}]}, "a number beyond 9007199254740991 in const or enum"),
        ({"$id": "a", "anyOf": [{"$ref": "#"}, {"type": "null"}]}, "$id within another schema"),
        ({"$ref": "#/default"}, "$ref '#/default'; refer to a part of the schema"),
        ({"prefixItems": [{}], "additionalItems": False}, "additionalItems beside prefixItems"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "use anyOf"),
        ({"const": ["bell \a"]}, "control characters"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"$ref": "#/$defs/absent"}, "absent"),
    ],
)
def test_unenforceable_schema_is_rejected_with_its_path(
    compiler: GrammarCompiler, part: dict[str, Any], message: str
) -> None:
    schema = closed(a={"type": "array", "items": part}, b={"type": "null"})
    with pytest.raises(InputError) as refused:
        compiler.compile(schema | {"x-guidance": {"lenient": True}})
    start = "json_schema: cannot be enforced at $.properties.a.items: "
    assert str(refused.value).startswith(start)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "is not a valid schema at $.properties.a.type"),
        ({"required": "a"}, "is not a valid schema at $.required: 'a' is not of type 'array'"),
        ({"maxLength": -1}, "$.maxLength: -1 is less than the minimum of 0"),
        ({"items": [{"type": "null"}]}, "$.items"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum"),
        ({"enum": [float("nan")]}, "must be a JSON schema as an object"),
        ({"const": {1, 2}}, "must be a JSON schema as an object"),
        ({"$schema": 3}, "must be a JSON schema as an object"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1 + 2**-52}, "greater than maximum"),
        ({"allOf": [{"multipleOf": 31}, {"multipleOf": 37}]}, "at $.allOf[1]: multipleOf 37; the"),
        ({"$ref": "#"}, "no document conforms to it"),
        ({"const": "\ud800"}, "must be a JSON schema as an object"),
        ([], "must be a JSON schema as an object"),
    ],
)
def test_invalid_schema_is_rejected(compiler: GrammarCompiler, schema: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        compiler.compile(schema)
    assert str(refused.value).startswith("json_schema: ")
    assert message in str(refused.value)


def test_dead_end_is_an_error(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(closed(a={"type": "string", "pattern": "^\a$"}))
    with pytest.raises(InputError, match=r"cannot be enforced at \$: nothing can follow .*{\"a\":"):
        walk(grammar, 10, seed=0)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"title": "x" * 200_000}, "has 200005 characters or more; at most 131072 are allowed"),
        ({"const": [None] * 20_000}, "has 20002 values or more; at most 20000 are allowed"),
        ({"enum": nested_lists(200)}, "has 101 nested objects and lists or more; at most 100"),
        ({"pattern": "a" * 8_001}, "$: a pattern of 8001 characters; at most 8000 are allowed"),
        ({"patternProperties": {"^a{0,10001}$": {}}}, "$: a repeat of 10001 in a pattern"),
        ({"items": {"minItems": 10_001}}, "$.items: minItems 10001; at most 10000 is allowed"),
        (
            {"properties": {str(i): {"type": "null"} for i in range(2_000)}},
            "it is too complex",
        ),
    ],
)
def test_schema_beyond_a_limit_is_rejected(
    compiler: GrammarCompiler, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        compiler.compile(schema)
    assert message in str(refused.value)


def test_stop_reason_says_whether_the_json_is_complete() -> None:
    engine = xgenmm.load(str(DEMO), device="cpu")
    schema = {"const": {"kind": "shapes", "colors": ["red", "blue"]}}

    def ask(limit: int) -> tuple[str, xgenmm.Usage]:
        sampling = SamplingParams(max_new_tokens=limit)
        answer = engine.stream(Request("What?", sampling=sampling, json_schema=schema))
        return answer.text(), answer.usage

    text, usage = ask(100)
    assert (json.loads(text), usage.stop_reason) == (schema["const"], "end")
    assert ask(usage.output_tokens)[0] == text
    assert ask(usage.output_tokens)[1].stop_reason == "end"
    beginning, cut = ask(usage.output_tokens - 1)
    assert (cut.stop_reason, cut.output_tokens) == ("length", usage.output_tokens - 1)
    assert text.startswith(beginning)
    engine.close()


SLOW = {"patternProperties": {f"^k{i}$": {"type": "null"} for i in range(900)}}
LARGE = {"type": "object", "required": [f"key{i}" for i in range(8_000)]}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3_000)} | {"d3000": {}}
DEEP = {"$ref": "#/$defs/d0", "$defs": CHAIN}


def test_check_that_takes_too_much_ends_and_the_next_one_works() -> None:
    limits = SchemaLimits(seconds=0.5, memory=32 << 20)
    compiler = GrammarCompiler(TOKENIZER, END_IDS, VOCAB, limits)
    for schema in (SLOW, LARGE, DEEP):
        with pytest.raises(InputError, match=r"takes more than .* to check, or nests too deeply"):
            compiler.compile(schema)
        assert accepts(compiler, {"type": "null"}, "null")
    compiler.close()


def test_process_that_was_killed_is_started_again() -> None:
    compiler = GrammarCompiler(TOKENIZER, END_IDS, VOCAB)
    before = {process.pid for process in psutil.Process().children()}
    compiler.compile(BOX)
    (started,) = (p for p in psutil.Process().children() if p.pid not in before)
    started.kill()
    started.wait()
    compiler.compile({"type": "null"})
    compiler.close()
    assert {process.pid for process in psutil.Process().children()} <= before


def test_schema_is_checked_once(monkeypatch: pytest.MonkeyPatch, compiler: GrammarCompiler) -> None:
    refused, allowed = closed(once={"not": {}}), closed(once={"type": "null"})
    for _ in range(2):
        compiler.compile(allowed)
        with pytest.raises(InputError, match="'not' is not supported"):
            compiler.compile(refused)
        monkeypatch.setattr(SchemaProcess, "check", None)
