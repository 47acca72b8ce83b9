"""The fields `tools` and `tool_choice` as the dialects check them, with their messages.

Owns the checks; what a choice means stands in `tool_use`.
"""

from __future__ import annotations

import logging
from typing import Any

from ovms_lora.server.fields import ModelLimits, Schema, Together, Values, takes

log = logging.getLogger(__name__)

_CHOICES = ("none", "auto", "required")
_USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'

_NAME: Schema = {"type": "string", "minLength": 1}
_FUNCTION: Schema = {
    "type": "object",
    "properties": {"name": _NAME, "parameters": {"type": ["object", "null"]}},
    "required": ["name"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["function"],
}
_OTHER_TOOL: Schema = {
    "type": "object",
    "properties": {"type": {"type": "string", "not": {"const": "function"}}},
    "required": ["type"],
}


def _choice_schema(name: Schema) -> Schema:
    function = {"type": "object", "properties": {"name": name}, "required": ["name"]}
    named = {"type": "object", "properties": {"function": function}, "required": ["function"]}
    return {"anyOf": [{"enum": list(_CHOICES)}, named]}


@takes({"type": "array", "items": {"anyOf": [_TOOL, _OTHER_TOOL]}})
def ovms_tools(value: Any) -> list[dict[str, Any]]:
    """An array of tools, of which those that are no functions are left out, as OVMS does. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("Tools are not an array")
    functions = [tool for tool in value if _is_function(tool)]
    if len(functions) < len(value):
        log.warning("%d tools that are no functions are left out", len(value) - len(functions))
    return functions


def _is_function(tool: Any) -> bool:
    if not isinstance(tool, dict):
        raise ValueError("Tool is not a JSON object")
    if not isinstance(tool.get("type", "function"), str):
        raise ValueError("Tool type is missing or invalid")
    if tool.get("type", "function") != "function":
        return False
    function = tool.get("function")
    if not isinstance(function, dict):
        raise ValueError("Function is not a valid JSON object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("Function object does not contain a valid name field")
    if not isinstance(function.get("parameters"), dict | None):
        raise ValueError("Function parameters are not a valid JSON object")
    return True


@takes({"type": "array", "items": _TOOL})
def vllm_tools(value: Any) -> list[dict[str, Any]]:
    """An array of functions. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("tools must be an array")
    if not all(map(_is_function, value)):
        raise ValueError("tools must have the type function")
    return value


@takes(_choice_schema({"type": "string"}))
def ovms_tool_choice(value: Any) -> Any:
    """`none`, `auto`, `required`, or an object that names a function. Raises ValueError."""
    if isinstance(value, str):
        if value not in _CHOICES:
            raise ValueError("tool_choice should be either 'none' or 'auto' or 'required'")
        return value
    if not isinstance(value, dict):
        raise ValueError("tool_choice is not a valid JSON object or string")
    function = value.get("function")
    if not isinstance(function, dict):
        raise ValueError("tool_choice.function is not a valid JSON object")
    if not isinstance(function.get("name"), str):
        raise ValueError("tool_choice.function.name is not a valid string")
    return value


@takes(_choice_schema(_NAME))
def vllm_tool_choice(value: Any) -> Any:
    """As `ovms_tool_choice`, with vLLM's messages. Raises ValueError."""
    if isinstance(value, str) and value in _CHOICES:
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f'Invalid value for `tool_choice`: {value}! Only named tools, "none", "auto" or "required" are supported.'
        )
    function = value.get("function")
    if not isinstance(function, dict):
        raise ValueError(f"Invalid value for `function`: `{function}` in `tool_choice`! {_USAGE}")
    if "name" not in function:
        raise ValueError(f"Expected field `name` in `function` in `tool_choice`! {_USAGE}")
    if not isinstance(function["name"], str) or not function["name"]:
        raise ValueError(f"Invalid `name` in `function`: `{function['name']}` in `tool_choice`! {_USAGE}")
    return value


def _names_no_tool(values: Values, _: ModelLimits) -> bool:
    choice = values.get("tool_choice")
    names = [tool["function"]["name"] for tool in values.get("tools", ())]
    return isinstance(choice, dict) and "tools" in values and choice["function"]["name"] not in names


NEEDS_TOOLS = Together(
    "tool_choice",
    lambda values, _: values.get("tool_choice", "none") != "none" and "tools" not in values,
    "When using `tool_choice`, `tools` must be set.",
)
NAMES_A_TOOL = Together(
    "tool_choice", _names_no_tool, "The tool specified in `tool_choice` does not match any of the specified `tools`"
)
ONE_CONSTRAINT = Together(
    "tool_choice",
    lambda values, _: (
        values.get("tool_choice", "auto") not in ("none", "auto")
        and bool(values.get("tools"))
        and any(values.get(name) is not None for name in ("response_format", "structured_outputs"))
    ),
    "a tool_choice that forces a call cannot go together with another constraint",
)
