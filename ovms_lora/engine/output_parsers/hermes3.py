"""hermes3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and Qwen write it."""

from __future__ import annotations

from ovms_lora.engine.output_parsers.call_object import read_call
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import accept, attempt, content_until, skip_space
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("<tool_call>", "</tool_call>")
_OPEN, _CLOSE = MARKERS


def hermes3(source: TextSource) -> Steps[None]:
    """Content and calls in any order."""
    while (yield from content_until(source, _OPEN)):
        if (yield from attempt(source, read_call)):
            yield from accept(source, _CLOSE)
            yield from skip_space(source)
