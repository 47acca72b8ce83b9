"""mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` of the newer models.

The array is also recognised without the marker, at the beginning of a text, as OVMS does.
"""

from __future__ import annotations

import string

from ovms_lora.engine.output_parsers.call_object import read_arguments, read_calls
from ovms_lora.engine.output_parsers.deltas import CallStart
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import (
    NotThisFormat,
    accept,
    attempt,
    content_until,
    next_char,
    skip_space,
    word,
)
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_CALLS, _ARGS, _CALL_ID = MARKERS
_NAME = string.ascii_letters + string.digits + "_-."


def mistral(source: TextSource) -> Steps[None]:
    """Content and calls in any order."""
    source.mark()
    begins = yield from accept(source, "[")
    source.rewind()
    while begins or (yield from content_until(source, _CALLS)):
        begins = False
        if (yield from attempt(source, _read_either)):
            yield from skip_space(source)


def _read_either(source: TextSource) -> Steps[None]:
    yield from accept(source, _CALLS)
    yield from skip_space(source)
    array = (yield from next_char(source)) == "["
    yield from (read_calls if array else _read_named)(source)


def _read_named(source: TextSource) -> Steps[None]:
    name = yield from word(source, _NAME)
    if (yield from accept(source, _CALL_ID)):
        yield from word(source, _NAME)
    yield from accept(source, _ARGS)
    yield from skip_space(source)
    if not name or (yield from next_char(source)) != "{":
        raise NotThisFormat
    yield CallStart(name)
    yield from read_arguments(source)
