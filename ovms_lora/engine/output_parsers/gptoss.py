"""gptoss: OpenAI's harmony format, a sequence of messages on channels.

    <|channel|>analysis<|message|>…<|end|>                                             reasoning
    <|start|>assistant<|channel|>commentary to=functions.name <|constrain|>json<|message|>{…}<|call|>   a call
    <|start|>assistant<|channel|>final<|message|>…<|return|>                            content

Tool parser and reasoning parser of this name are one grammar: the channels tell everything.
"""

from __future__ import annotations

import re

from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart, Content, Reasoning
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import NotThisFormat, attempt, content_until, text_until
from ovms_lora.engine.output_parsers.text_source import TextSource

MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
_START, _CHANNEL, _MESSAGE = MARKERS[:3]
_ENDS = MARKERS[3:6]
_CALL_OF = re.compile(r"to=functions\.([^\s<]+)")


def gptoss(source: TextSource) -> Steps[None]:
    """Messages one after the other; text between them is content."""
    while (yield from content_until(source, _START, _CHANNEL)):
        yield from attempt(source, _read_message)


def _read_message(source: TextSource) -> Steps[None]:
    header = yield from text_until(source, _MESSAGE)
    channel = header.rpartition(_CHANNEL)[2].strip()
    if channel.startswith("analysis"):
        yield from _body(source, Reasoning)
    elif called := _CALL_OF.search(header):
        yield CallStart(called[1])
        yield from _body(source, Arguments)
    elif channel.startswith(("final", "commentary")):
        yield from _body(source, Content)
    else:
        raise NotThisFormat


def _body(source: TextSource, kind: type[Arguments | Content | Reasoning]) -> Steps[None]:
    while True:
        taken = source.take_until(_ENDS)
        if taken.text:
            yield kind(taken.text)
        if taken.marker or source.closed:
            return
        yield None
