"""Calls of a text that was made to be one, by a JSON schema: `tool_choice` required, or a named function."""

from __future__ import annotations

from ovms_lora.engine.output_parsers.call_object import read_arguments, read_calls
from ovms_lora.engine.output_parsers.deltas import CallStart
from ovms_lora.engine.output_parsers.parser import Grammar, Steps, plain
from ovms_lora.engine.output_parsers.reading import NotThisFormat, attempt, next_char, skip_space
from ovms_lora.engine.output_parsers.text_source import TextSource


def required(source: TextSource) -> Steps[None]:
    """The whole text is an array of calls."""
    source.mark()
    if (yield from attempt(source, read_calls)):
        yield from skip_space(source)
    yield from plain(source)


def named(name: str) -> Grammar:
    """Return the grammar of a text that is the arguments of one function."""

    def read(source: TextSource) -> Steps[None]:
        yield from skip_space(source)
        if (yield from next_char(source)) != "{":
            raise NotThisFormat
        yield CallStart(name)
        yield from read_arguments(source)

    def grammar(source: TextSource) -> Steps[None]:
        source.mark()
        if (yield from attempt(source, read)):
            yield from skip_space(source)
        yield from plain(source)

    return grammar
