"""Prompts, messages and stop strings as clients write them, checked and brought into one form.

Owns the structured fields that both dialects share; knows nothing of tokens.
"""

from __future__ import annotations

import json
from typing import Any

from ovms_lora.core.strength import MAX_STRENGTH, is_strength
from ovms_lora.server.bounds import Bound, at_most
from ovms_lora.server.fields import Check, Schema, takes

PromptInput = str | tuple[int, ...]

MAX_BLEND = 64

_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKEN_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPT_LIST: Schema = {
    "type": "array",
    "minItems": 1,
    **at_most("maxItems", "prompts"),
    "items": {"anyOf": [_TEXT, _TOKEN_IDS]},
}
_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TOOL_CALL: Schema = {"type": "object", "properties": {"function": {"type": "object"}}, "required": ["function"]}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _TOOL_CALL}, {"type": "null"}]},
    },
    "required": ["role"],
}
_STOP: Schema = {"type": "string", "minLength": 1, **at_most("maxLength", "stop_characters")}
_STRENGTH: Schema = {"type": "number", "minimum": -MAX_STRENGTH, "maximum": MAX_STRENGTH}
_BLEND_PART: Schema = {
    "type": "object",
    "properties": {"alias": {"type": "string"}, "alpha": {"anyOf": [_STRENGTH, {"type": "null"}]}},
    "required": ["alias"],
    "additionalProperties": False,
}


@takes({"anyOf": [_TEXT, _TOKEN_IDS, _PROMPT_LIST]})
def prompts(value: Any) -> tuple[PromptInput, ...]:
    """A string, a list of strings, a list of token ids, or a list of such lists. Raises ValueError."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("prompt is not a string")
    checked = tuple(_prompt(item) for item in value)
    if not checked or not all(checked):
        raise ValueError("prompt is missing")
    return checked


PROMPTS = Bound("prompts", "prompt array must have no more than {limit} prompts")


def _prompt(value: Any) -> PromptInput:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_token_id, value)):
        return tuple(value)
    raise ValueError("prompt is not a string")


def _is_token_id(value: Any) -> bool:
    return type(value) is int and value >= 0


@takes({"type": "array", "minItems": 1, "items": _MESSAGE})
def messages(value: Any) -> list[dict[str, Any]]:
    """A non-empty array of chat messages; content becomes one string. Raises ValueError with OVMS's messages."""
    if not isinstance(value, list):
        raise ValueError("Messages are not an array")
    if not value:
        raise ValueError("Messages array cannot be empty")
    return [_message(item) for item in value]


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("Message is not a JSON object")
    if not isinstance(value.get("role"), str):
        raise ValueError("Every message must have 'role' field")
    message = {**value, "content": _content(value.get("content"))}
    calls = _tool_calls(message.pop("tool_calls", None))
    return {**message, "tool_calls": calls} if calls else message


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Earlier calls of the assistant, their arguments as the objects that templates expect."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError("tool_calls must be an array")
    return [_tool_call(call) for call in value]


def _tool_call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("Each tool_call must be an object")
    function = value.get("function")
    if not isinstance(function, dict):
        raise ValueError("Each tool_call must have a 'function' object")
    return {**value, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(value: Any) -> Any:
    if not isinstance(value, str):
        return {} if value is None else value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return value  # a model wrote it, and the conversation goes on


def _content(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("Invalid message structure - content should be string or array")
    return "\n".join(_content_part(part) for part in value)


def _content_part(part: Any) -> str:
    if not isinstance(part, dict):
        raise ValueError("Invalid message structure - content array should contain objects")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise ValueError("Invalid message structure - content object type missing")
    if kind in ("image_url", "input_audio"):
        raise ValueError(f"This servable supports only text input, but {kind} has been provided")
    if kind != "text":
        raise ValueError("Unsupported content type")
    if not isinstance(part.get("text"), str):
        raise ValueError("Invalid message structure - content text missing")
    return str(part["text"])


@takes({"anyOf": [_STOP, {"type": "array", "items": _STOP, **at_most("maxItems", "stop_strings")}]})
def stop_strings(value: Any) -> tuple[str, ...]:
    """One stop string or several. Raises ValueError."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("stop is not a string or array of strings")
    if not all(isinstance(item, str) for item in value):
        raise ValueError("stop array contains non string element")
    if not all(value):
        raise ValueError("stop contains an empty string")
    return tuple(value)


STOPS = (
    Bound("stop_strings", "stop array must have no more than {limit} strings"),
    Bound(
        "stop_characters",
        "stop strings must have no more than {limit} characters",
        lambda value: max(map(len, value), default=0),
    ),
)


def stream_options(*accepted: str) -> Check:
    """An object of bools, none but the accepted ones."""
    properties = {name: {"type": "boolean"} for name in accepted}

    @takes({"type": "object", "properties": properties, "additionalProperties": False})
    def check(value: Any) -> dict[str, bool]:
        if not isinstance(value, dict):
            raise ValueError("stream_options is not an object")
        for name in accepted:
            if not isinstance(value.get(name, False), bool):
                raise ValueError(f"stream_options.{name} is not a boolean")
        if set(value) - set(accepted):
            known = ", ".join(accepted)
            raise ValueError(
                f"Found unexpected stream options. Properties accepted in stream_options: {known}",
            )
        return value

    return check


@takes({"type": "object", "additionalProperties": _STRENGTH})
def lora_alphas(value: Any) -> dict[str, float]:
    """An object of numbers. Raises ValueError with OVMS's messages."""
    if not isinstance(value, dict):
        raise ValueError("lora_alphas must be an object")
    return {alias: _strength(alpha, f"lora_alphas value for '{alias}'") for alias, alpha in value.items()}


@takes({"type": "array", "maxItems": MAX_BLEND, "items": _BLEND_PART})
def lora(value: Any) -> tuple[tuple[str, float | None], ...]:
    """A blend: an array of `{"alias", "alpha"}`, alpha left out for the adapter's own. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("lora must be an array")
    if len(value) > MAX_BLEND:
        raise ValueError(f"lora must have no more than {MAX_BLEND} adapters")
    parts = tuple(_blend_part(part) for part in value)
    if len({alias for alias, _ in parts}) < len(parts):
        raise ValueError("lora names an adapter twice")
    return parts


def _blend_part(part: Any) -> tuple[str, float | None]:
    if not isinstance(part, dict) or not isinstance(part.get("alias"), str):
        raise ValueError("lora must hold objects with an alias")
    if set(part) - {"alias", "alpha"}:
        raise ValueError("lora must hold objects of alias and alpha only")
    alpha, alias = part.get("alpha"), part["alias"]
    return alias, None if alpha is None else _strength(alpha, f"lora alpha for '{alias}'")


def _strength(value: Any, what: str) -> float:
    """Return a number that may be a strength. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} must be a number")
    if not is_strength(value):
        raise ValueError(f"{what} out of range({-MAX_STRENGTH}, {MAX_STRENGTH})")
    return float(value)
