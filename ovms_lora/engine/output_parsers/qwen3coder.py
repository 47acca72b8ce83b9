"""qwen3coder: `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`.

Values are plain text. What they become in JSON is told by the types in the tool's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart
from ovms_lora.engine.output_parsers.parser import Grammar, Steps
from ovms_lora.engine.output_parsers.reading import (
    NotThisFormat,
    accept,
    attempt,
    content_until,
    expect,
    skip_space,
    text_until,
)
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")
_CALL, _CALL_END, _FUNCTION, _FUNCTION_END, _PARAMETER, _PARAMETER_END = MARKERS
_LONGEST_NAME = 256
_PYTHON_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}

Schemas = Mapping[str, Mapping[str, Any]]


def qwen3coder(tools: Sequence[Mapping[str, Any]]) -> Grammar:
    """Return the grammar for calls of these tools."""
    functions = [tool.get("function", {}) for tool in tools]
    schemas: Schemas = {function["name"]: _properties(function) for function in functions if "name" in function}

    def grammar(source: TextSource) -> Steps[None]:
        # Some models leave the outer tag out.
        while marker := (yield from content_until(source, _CALL, _FUNCTION)):
            read = _read_function if marker == _FUNCTION else _read_outer
            if (yield from attempt(source, partial(read, schemas=schemas))):
                yield from skip_space(source)

    return grammar


def _read_outer(source: TextSource, schemas: Schemas) -> Steps[None]:
    yield from expect(source, _FUNCTION)
    yield from _read_function(source, schemas)


def _read_function(source: TextSource, schemas: Schemas) -> Steps[None]:
    name = yield from text_until(source, ">")
    if not 0 < len(name) <= _LONGEST_NAME or "\n" in name:
        raise NotThisFormat
    yield CallStart(name)
    yield Arguments("{")
    yield from _read_parameters(source, schemas.get(name, {}))
    yield from accept(source, _CALL_END)


def _read_parameters(source: TextSource, properties: Mapping[str, Any]) -> Steps[None]:
    """Give out one argument after the other; a text that ends in the middle leaves their object open."""
    separator = ""
    while marker := (yield from content_until(source, _PARAMETER, _FUNCTION_END, _CALL_END)):
        if marker != _PARAMETER:
            yield Arguments("}")
            return
        try:
            key = yield from text_until(source, ">")
            value = yield from text_until(source, _PARAMETER_END)
        except NotThisFormat:
            return
        written = _as_json(value.removeprefix("\n").removesuffix("\n"), properties.get(key))
        yield Arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: {written}")
        separator = ", "


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _as_json(value: str, schema: Any) -> str:
    """Return a value as JSON text of a type that the schema allows; what does not fit stays a string."""
    types = _types(schema)
    if types - {"string"}:
        try:
            parsed = json.loads(_PYTHON_WORDS.get(value.strip().lower(), value))
        except (ValueError, RecursionError):
            parsed = value
        if "string" not in types or parsed is None:
            return json.dumps(parsed, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {name for name in named or () if isinstance(name, str)}
    for choice in (*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        types |= _types(choice)
    return types


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
