"""ToolUse: which tools a request offers, whether it forces a call, and what its answer has to look like then.

A forced call is a JSON schema for the whole text, as in vLLM: an array of `{"name", "parameters"}` for `required`, the
parameters alone for a named function. Compiling it is the engine's work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.engine.output_parsers import forced
from ovms_lora.engine.output_parsers.formats import answer_grammar, visible_markers
from ovms_lora.engine.output_parsers.parser import Grammar
from ovms_lora.server.constraints import AskedConstraint

if TYPE_CHECKING:
    from ovms_lora.engine.model import LoadedModel
    from ovms_lora.server.fields import Values

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """`required` and `named` force a call; `one_call` allows no second one."""

    tools: tuple[Tool, ...] = ()
    required: bool = False
    named: str | None = None
    one_call: bool = False

    @classmethod
    def of(cls, values: Values) -> ToolUse:
        """Return what the checked fields of a request say; a named function is the only one that is offered."""
        tools, choice = values.get("tools") or (), values.get("tool_choice", "auto")
        if choice == "none" or not tools:
            return cls()
        one_call = values.get("parallel_tool_calls") is False
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            return cls(tuple(tool for tool in tools if tool["function"]["name"] == name)[:1], named=name)
        return cls(tuple(tools), required=choice == "required", one_call=one_call)

    def constraint(self) -> AskedConstraint | None:
        """Return what the text must match where a call is forced. Raises InvalidFieldError."""
        if self.named is not None:
            schema: Any = _parameters(self.tools[0])
        elif self.required:
            schema = _calls_schema(self.tools, one_call=self.one_call)
        else:
            return None
        return AskedConstraint("tools", ConstraintSpec(ConstraintKind.JSON_SCHEMA, json.dumps(schema)))

    def grammar(self, model: LoadedModel, prompt: str, *, constrained: bool) -> Grammar:
        """Return how the answer is read. A text that must match something from its beginning has no reasoning."""
        if self.named is not None:
            return forced.named(self.named)
        if self.required:
            return forced.required
        options = model.options
        reasoning_parser = "" if constrained else options.reasoning_parser
        return answer_grammar(
            options.tool_parser, reasoning_parser, tools=self.tools, prompt=prompt, one_call=self.one_call
        )

    def needs_special_tokens(self, model: LoadedModel) -> bool:
        """Whether the answer can only be read with special tokens in its text."""
        options = model.options
        tool_parser = options.tool_parser if self.tools else ""
        special = model.tokenizer.special_tokens
        return any(marker in special for marker in visible_markers(tool_parser, options.reasoning_parser))


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


def _calls_schema(tools: tuple[Tool, ...], *, one_call: bool) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    choices = []
    for tool in tools:
        parameters = dict(_parameters(tool))
        for name, definition in (parameters.pop("$defs", None) or {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise InvalidFieldError(f"Tool definition '{name}' has multiple schemas", param="tools")
        call = {"name": {"type": "string", "enum": [tool["function"]["name"]]}, "parameters": parameters}
        choices.append(
            {"type": "object", "properties": call, "required": ["name", "parameters"], "additionalProperties": False}
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    if one_call:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema
