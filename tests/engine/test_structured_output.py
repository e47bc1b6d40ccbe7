"""Structured answers: whatever a model makes of the mask is JSON that its schema admits."""

import json
from typing import Any

import jsonschema
import pytest
import torch

from tests.support.tiny import DEMO
from xgenmm.checkpoints.registry import read_config
from xgenmm.engine.structured_output import Grammar, GrammarCompiler
from xgenmm.errors import InputError
from xgenmm.preprocessing.tokenizer import Tokenizer

CONFIG = read_config(DEMO)
TOKENS = Tokenizer.from_folder(DEMO, CONFIG.text.convention, CONFIG.additional_ids)
VOCAB = CONFIG.decoder.initial_vocab + CONFIG.decoder.additional_tokens
ENDS = {TOKENS.id(token) for token in CONFIG.text.stop_tokens}


def closed(**properties: Any) -> dict[str, Any]:
    """An object with just these members."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


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
def grammars() -> GrammarCompiler:
    """For the demo's tokenizer."""
    return GrammarCompiler(TOKENS, ENDS, VOCAB)


def walk(constraint: Grammar, limit: int, seed: int) -> list[int]:
    """At most `limit` tokens that a model with random opinions chooses, without the end."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit and not constraint.finished:
        scores = 3 * torch.randn(VOCAB, generator=generator)
        token = int(scores.masked_fill(~constraint.mask(limit - len(ids)), -torch.inf).argmax())
        if token in ENDS:
            break
        constraint.advance(token)
        ids.append(token)
    return ids


def spelled(constraint: Grammar, text: str) -> bool:
    """Whether the constraint admits this text whole, made of the tokens of its characters."""
    for character in text:
        token = next(i for i in range(VOCAB) if constraint._grammars.texts[i] == character.encode())
        if not constraint.mask()[token]:
            return False
        constraint.advance(token)
    return bool(constraint.mask()[list(ENDS)].all())


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_comes_is_json_that_validates(grammars: GrammarCompiler, name: str) -> None:
    for seed in range(4):
        ids = walk(grammars.compile(SCHEMAS[name]), limit=150, seed=seed)
        jsonschema.validate(json.loads(TOKENS.decode(ids)), SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_short_limit_still_gives_whole_json(grammars: GrammarCompiler, name: str) -> None:
    way = grammars.compile(SCHEMAS[name]).way_out(200)
    for limit in (len(way), len(way) + 1, len(way) + 20):
        constraint = grammars.compile(SCHEMAS[name])
        ids = walk(constraint, limit, seed=limit)
        jsonschema.validate(json.loads(TOKENS.decode(ids)), SCHEMAS[name])
    assert len(way) > 1


def test_only_the_limit_shapes_an_answer(grammars: GrammarCompiler) -> None:
    free, bound = grammars.compile({"type": "string"}), grammars.compile({"type": "string"})
    assert torch.equal(free.mask(), bound.mask(left=500))
    assert not bound.cut
    assert bound.mask(left=3).sum() == 1
    assert bound.cut


def test_a_limit_below_any_answer_is_no_error(grammars: GrammarCompiler) -> None:
    constraint = grammars.compile(BOX)
    assert len(walk(constraint, limit=4, seed=0)) == 4
    assert not constraint.cut


@pytest.mark.parametrize("text", ['{"a":1}', ' {"a": 1}', '{"a":-7}'])
def test_space_where_it_is_allowed(grammars: GrammarCompiler, text: str) -> None:
    assert spelled(grammars.compile(closed(a={"type": "integer"})), text)


@pytest.mark.parametrize(
    "text", ['  {"a":1}', '{ "a":1}', '{"a" :1}', '{"a":  1}', '{"a":1 }', '{"a":1} ', "{'a':1}"]
)
def test_space_where_it_is_not(grammars: GrammarCompiler, text: str) -> None:
    assert not spelled(grammars.compile(closed(a={"type": "integer"})), text)


def test_a_member_has_one_spelling(grammars: GrammarCompiler) -> None:
    schema = SCHEMAS["named and other"]
    assert spelled(grammars.compile(schema), '{"a":1,"b":"x"}')
    assert not spelled(grammars.compile(schema), '{"\\u0061":"x"}')


def test_the_prefix_of_the_first_token_is_no_part_of_the_answer(grammars: GrammarCompiler) -> None:
    constraint = grammars.compile({"type": "integer"})
    prefix = next(
        i for i in range(VOCAB) if TOKENS.decode([i, i]) == " " and not TOKENS.decode([i])
    )
    assert constraint.mask()[prefix]
    constraint.advance(prefix)
    assert not constraint.mask()[prefix]
    assert TOKENS.decode([prefix, *walk(constraint, 20, seed=1)]).strip("-").isdecimal()


def test_special_tokens_only_end(grammars: GrammarCompiler) -> None:
    specials = set(TOKENS.specials.values())
    constraint = grammars.compile({"type": "string"})
    for token in walk(grammars.compile({"type": "string"}), limit=60, seed=2):
        allowed = {int(i) for i in constraint.mask().nonzero()}
        assert allowed
        assert not allowed & specials
        constraint.advance(token)
    assert constraint.finished
    assert {int(i) for i in constraint.mask().nonzero()} == ENDS


def test_a_number_may_end_or_go_on_up_to_its_length(grammars: GrammarCompiler) -> None:
    constraint = grammars.compile({"type": "integer"})
    seven = grammars.texts.index(b"7")
    for _ in range(15):
        assert constraint.mask()[seven]
        constraint.advance(seven)
        assert not constraint.finished
    assert {int(i) for i in constraint.mask().nonzero()} == ENDS
    large = grammars.compile({"type": "integer", "minimum": 10**17})
    assert json.loads(TOKENS.decode(walk(large, 30, seed=3))) >= 10**17


def test_bytes_make_whole_characters(grammars: GrammarCompiler) -> None:
    """With nothing but byte tokens to choose from, beyond ASCII where it can be."""
    texts, generator = grammars.texts, torch.Generator().manual_seed(4)
    high = torch.tensor([len(text) == 1 and text[0] >= 0x80 for text in texts])
    constraint, ids = grammars.compile({"type": "string"}), [texts.index(b'"')]
    constraint.advance(ids[0])
    for _ in range(300):
        allowed = constraint.mask() & high
        ids.append(int(torch.rand(VOCAB, generator=generator).masked_fill(~allowed, -1).argmax()))
        constraint.advance(ids[-1])
    way = constraint.way_out(10)
    text = TOKENS.decode([i for i in ids + way if i not in ENDS])
    assert len(json.loads(text)) > 60
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_constraints_share_nothing(grammars: GrammarCompiler) -> None:
    alone = [walk(grammars.compile(BOX), 90, seed) for seed in (5, 6)]
    pair = [grammars.compile(BOX) for _ in alone]
    for tokens in zip(*alone, strict=False):
        for constraint, token in zip(pair, tokens, strict=True):
            constraint.way_out(60)
            assert constraint.mask()[token]
            constraint.advance(token)
    assert alone[0] != alone[1]


def test_a_token_that_was_not_allowed(grammars: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="is not allowed after"):
        grammars.compile(BOX).advance(grammars.texts.index(b"}"))


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
        ({"type": "integer", "format": "int32"}, "format 'int32' of no string"),
        ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf 0.01; use a whole number"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "use anyOf"),
        ({"const": ["bell \a"]}, "control characters"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"$ref": "#/$defs/absent"}, "absent"),
    ],
)
def test_what_cannot_be_enforced_is_refused_where_it_is(
    grammars: GrammarCompiler, part: dict[str, Any], message: str
) -> None:
    schema = closed(a={"type": "array", "items": part}, b={"type": "null"})
    with pytest.raises(InputError) as refused:
        grammars.compile(schema | {"x-guidance": {"lenient": True}})
    start = "json_schema: cannot be enforced at $.properties.a.items: "
    assert str(refused.value).startswith(start)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "is no valid schema at $.properties.a.type"),
        ({"required": "a"}, "is no valid schema at $.required: 'a' is not of type 'array'"),
        ({"maxLength": -1}, "$.maxLength: -1 is less than the minimum of 0"),
        ({"items": [{"type": "null"}]}, "$.items"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum"),
        ({"enum": [float("nan")]}, "must be a JSON schema as an object"),
        ({"const": {1, 2}}, "must be a JSON schema as an object"),
        ({"$schema": 3}, "must be a JSON schema as an object"),
        ({"$ref": "#"}, "nothing can follow"),
        ({"type": "string", "pattern": "^\a$"}, "nothing can follow"),
        ([], "must be a JSON schema as an object"),
    ],
)
def test_what_is_no_schema_is_refused(grammars: GrammarCompiler, schema: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        grammars.compile(schema)
    assert str(refused.value).startswith("json_schema: ")
    assert message in str(refused.value)
