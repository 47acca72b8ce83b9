"""llama3: `{"name": …, "parameters": {…}}`, several joined by `;`, at the beginning or after `<|python_tag|>`."""

from __future__ import annotations

from ovms_lora.engine.output_parsers.call_object import read_call
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import accept, attempt, content_until, next_char, skip_space
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("<|python_tag|>",)


def llama3(source: TextSource) -> Steps[None]:
    """Calls, then content; after content, calls only behind the tag."""
    source.mark()
    yield from skip_space(source)
    begins = (yield from next_char(source)) == "{"
    if not begins:
        source.rewind()
    while begins or (yield from content_until(source, *MARKERS)):
        begins = yield from attempt(source, read_call)
        if begins:
            source.mark()
            begins = yield from accept(source, ";")
            if not begins:
                yield from skip_space(source)
