"""What a client says its text must look like: `response_format` of both dialects, vLLM's `structured_outputs`.

Checks the form and makes a ConstraintSpec of it; whether that compiles is the engine's to say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.server.fields import Schema, Values, takes

# vLLM's messages
NONE_SPECIFIED = "You must use one kind of structured outputs constraint but none are specified"
MULTIPLE_SPECIFIED = "You can only use one kind of structured outputs constraint but multiple are specified"
_NO_JSON_SCHEMA = "When response_format type is 'json_schema', the 'json_schema' field must be provided."

_FORMAT_SCHEMA: Schema = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "schema": {"type": "object"}},
    "required": ["schema"],
}
_FORMATS: tuple[Schema, ...] = (
    {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
    {
        "type": "object",
        "properties": {"type": {"const": "json_schema"}, "json_schema": _FORMAT_SCHEMA},
        "required": ["type", "json_schema"],
    },
)

_TEXT: Schema = {"type": "string", "minLength": 1}
_KINDS: dict[str, Schema] = {
    "json": {"anyOf": [{"type": "object"}, _TEXT]},
    "regex": _TEXT,
    "choice": {"type": "array", "minItems": 1, "items": {"type": "string"}},
    "grammar": _TEXT,
    "json_object": {"const": True},
}
# Options of single backends in vLLM; at these values they change nothing.
_HARMLESS: dict[str, Any] = {
    "disable_fallback": False,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
}

_JSON_OBJECT = ConstraintSpec(ConstraintKind.JSON_OBJECT)


def _structured_schema(kind: str) -> Schema:
    """One kind of constraint; null means that a member is not there."""
    harmless = {name: {"enum": [value, None]} for name, value in _HARMLESS.items() if value is not None}
    return {
        "type": "object",
        "properties": {kind: _KINDS[kind], **harmless},
        "required": [kind],
        "additionalProperties": {"type": "null"},
    }


@dataclass(frozen=True, slots=True)
class AskedConstraint:
    """A constraint, and the field that asks for it."""

    param: str
    spec: ConstraintSpec


def asked_constraint(values: Values) -> AskedConstraint | None:
    """Return the constraint of a request, from its checked fields."""
    for param in ("structured_outputs", "response_format"):
        if values.get(param) is not None:
            return AskedConstraint(param, values[param])
    return None


def asks_twice(values: Values) -> bool:
    """Whether both fields ask for something."""
    return values.get("structured_outputs") is not None and values.get("response_format") is not None


@takes({"anyOf": list(_FORMATS)})
def response_format(value: Any) -> ConstraintSpec | None:
    """An object with a known type; None for text, which may be anything. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("response_format is not an object")
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return _JSON_OBJECT
        case "json_schema":
            return _json_schema(value.get("json_schema"))
    raise ValueError("response_format.type must be one of text, json_object, json_schema")


def _json_schema(value: Any) -> ConstraintSpec:
    if value is None:
        raise ValueError(_NO_JSON_SCHEMA)
    if not isinstance(value, dict):
        raise ValueError("response_format.json_schema is not an object")
    if not isinstance(value.get("name", ""), str):
        raise ValueError("response_format.json_schema.name is not a string")
    if not isinstance(value.get("schema"), dict):
        raise ValueError("response_format.json_schema.schema is not an object")
    return _schema(value["schema"])


@takes({"anyOf": [_structured_schema(kind) for kind in _KINDS]})
def structured_outputs(value: Any) -> ConstraintSpec:
    """An object with exactly one kind of constraint. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("structured_outputs is not an object")
    given = {name: item for name, item in value.items() if item is not None}
    for name, item in given.items():
        if name not in _KINDS and item is not _HARMLESS.get(name):  # nor 0, which is False for Python
            raise ValueError(f"structured_outputs.{ascii(name)[1:-1][:64]} is not supported")
    kinds = [name for name in _KINDS if name in given]
    if not kinds:
        raise ValueError(NONE_SPECIFIED)
    if len(kinds) > 1:
        raise ValueError(MULTIPLE_SPECIFIED)
    return _structured(kinds[0], given[kinds[0]])


def _structured(kind: str, value: Any) -> ConstraintSpec:
    match kind:
        case "json_object":
            if value is not True:
                raise ValueError("structured_outputs.json_object must be true")
            return _JSON_OBJECT
        case "json":
            if isinstance(value, dict):
                return _schema(value)
            return ConstraintSpec(ConstraintKind.JSON_SCHEMA, _text(kind, value, "an object or a string"))
        case "choice":
            return ConstraintSpec(ConstraintKind.CHOICE, _choices(value))
    return ConstraintSpec(ConstraintKind(kind), _text(kind, value, "a string"))


def _schema(schema: dict[str, Any]) -> ConstraintSpec:
    return ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))


def _text(kind: str, value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"structured_outputs.{kind} is not {what}")
    if not value:
        raise ValueError(f"structured_outputs.{kind} must not be empty")
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ValueError("structured_outputs.choice is not an array of strings")
    if not value:
        raise ValueError("structured_outputs.choice must not be empty")
    return tuple(value)
