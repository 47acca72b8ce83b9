"""The formats by the names that graph.pbtxt has for them, and the grammar of one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.output_parsers import gptoss, hermes3, llama3, mistral, phi4, qwen3coder, reasoning
from ovms_lora.engine.output_parsers.deltas import CallStart, Content, Reasoning
from ovms_lora.engine.output_parsers.parser import Grammar, Steps, plain
from ovms_lora.engine.output_parsers.text_source import TextSource

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls. `markers` have to be visible in its text, also where they are special tokens."""

    grammar: Callable[[Tools], Grammar]
    markers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes reasoning: a grammar around that of the answer, which may depend on the prompt's end."""

    grammar: Callable[[Grammar, str], Grammar]
    markers: tuple[str, ...]


TOOL_FORMATS = {
    "gptoss": ToolFormat(lambda _: gptoss.gptoss, gptoss.MARKERS),
    "hermes3": ToolFormat(lambda _: hermes3.hermes3, hermes3.MARKERS),
    "llama3": ToolFormat(lambda _: llama3.llama3, llama3.MARKERS),
    "mistral": ToolFormat(lambda _: mistral.mistral, mistral.MARKERS),
    "devstral": ToolFormat(lambda _: mistral.mistral, mistral.MARKERS),
    "phi4": ToolFormat(lambda _: phi4.phi4, phi4.MARKERS),
    "qwen3coder": ToolFormat(qwen3coder.qwen3coder, qwen3coder.MARKERS),
}
REASONING_FORMATS = {
    "deepseek": ReasoningFormat(reasoning.deepseek_r1, reasoning.MARKERS),
    "deepseek_r1": ReasoningFormat(reasoning.deepseek_r1, reasoning.MARKERS),
    "gptoss": ReasoningFormat(lambda _answer, _prompt: gptoss.gptoss, gptoss.MARKERS),
    "qwen3": ReasoningFormat(reasoning.qwen3, reasoning.MARKERS),
}


def check_parser_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raise ModelFolderError for a name that is neither empty nor known."""
    for key, name, known in (
        ("tool_parser", tool_parser, sorted(TOOL_FORMATS)),
        ("reasoning_parser", reasoning_parser, sorted(REASONING_FORMATS)),
    ):
        if name and name not in known:
            raise ModelFolderError(f"graph.pbtxt: unknown {key} {name!r}", hint=f"known are {', '.join(known)}")


def answer_grammar(
    tool_parser: str, reasoning_parser: str, *, tools: Tools, prompt: str, one_call: bool = False
) -> Grammar:
    """Return the grammar of an answer of a model with these parsers. Without tools nothing in it is a call."""
    grammar: Grammar = TOOL_FORMATS[tool_parser].grammar(tools) if tool_parser and tools else plain
    if reasoning_parser:
        grammar = REASONING_FORMATS[reasoning_parser].grammar(grammar, prompt)
    return first_call(grammar) if one_call else grammar


def first_call(grammar: Grammar) -> Grammar:
    """Leave all calls but the first out (`parallel_tool_calls` false)."""

    def limited(source: TextSource) -> Steps[None]:
        calls = 0
        for delta in grammar(source):
            calls += isinstance(delta, CallStart)
            if calls <= 1 or delta is None or isinstance(delta, Content | Reasoning):
                yield delta

    return limited


def visible_markers(tool_parser: str, reasoning_parser: str) -> tuple[str, ...]:
    """Return the markers that the parsers look for."""
    tool = TOOL_FORMATS[tool_parser].markers if tool_parser else ()
    return (*tool, *(REASONING_FORMATS[reasoning_parser].markers if reasoning_parser else ()))
