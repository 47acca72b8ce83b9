"""What a parser makes of a text, put together again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart, Content, Delta, Reasoning
from ovms_lora.engine.output_parsers.parser import Grammar, OutputParser

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": "boolean"},
                "tags": {"type": "array"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "size": {"type": ["integer", "null"]},
            },
        },
    },
}


@dataclass
class Parsed:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)


def together(deltas: Iterable[Delta]) -> Parsed:
    """Put deltas together as a client does."""
    parsed = Parsed()
    for delta in deltas:
        match delta:
            case Content(text):
                parsed.content += text
            case Reasoning(text):
                parsed.reasoning += text
            case CallStart(name):
                parsed.calls.append((name, ""))
            case Arguments(text):
                name, before = parsed.calls[-1]
                parsed.calls[-1] = (name, before + text)
    return parsed


def parse(grammar: Grammar, *pieces: str) -> Parsed:
    """Parse a text that comes in pieces."""
    parser = OutputParser(grammar)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return together([*deltas, *parser.finish()])
