"""phi4: `functools[{"name": …, "arguments": {…}}, …]`."""

from __future__ import annotations

from ovms_lora.engine.output_parsers.call_object import read_calls
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import attempt, content_until, skip_space
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("functools",)


def phi4(source: TextSource) -> Steps[None]:
    """Content and calls in any order."""
    while (yield from content_until(source, *MARKERS)):
        if (yield from attempt(source, read_calls)):
            yield from skip_space(source)
