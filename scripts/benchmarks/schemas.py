"""JSON Schemas about the demo's scenes.

Each limits the length of its documents: the context would cut longer ones off, which makes them
invalid.
"""

from scripts.demo_model.scene import COLORS, KINDS

SHAPE_NAMES = tuple(f"{color} {kind}" for color in COLORS for kind in KINDS)


def _object(**properties: object) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: tuple[dict[str, object], ...] = (
    _object(answer={"enum": [*SHAPE_NAMES, "sign", "nothing"]}),
    _object(count={"type": "integer", "minimum": 0, "maximum": 4}, certain={"type": "boolean"}),
    _object(sign={"type": "string", "pattern": "^[A-Z]{3,5}$"}, shape={"enum": [*KINDS]}),
    _object(caption={"type": "string", "maxLength": 40}, share={"type": ["null", "boolean"]}),
    {"type": "array", "items": {"enum": [*COLORS]}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"const": "nothing"}, _object(kind={"enum": [*KINDS]})]},
    {
        "$defs": {"shape": _object(color={"enum": [*COLORS]}, kind={"enum": [*KINDS]})},
        "type": "array",
        "items": {"$ref": "#/$defs/shape"},
        "maxItems": 3,
    },
)
