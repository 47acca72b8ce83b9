"""A tool call written as JSON: `{"name": …, "arguments": {…}}`, alone or in an array.

The name is given out as soon as the arguments begin, and these as they come. Which formats put what around it stands
in their modules.
"""

from __future__ import annotations

import json
import string
from typing import Any

from ovms_lora.engine.output_parsers.deltas import Arguments, CallStart
from ovms_lora.engine.output_parsers.json_extent import JsonExtent
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.reading import (
    NotThisFormat,
    accept,
    attempt,
    decoded,
    expect,
    next_char,
    skip_space,
    word,
)
from ovms_lora.engine.output_parsers.text_source import TextSource

_ARGUMENTS = ("arguments", "parameters")
_SCALAR = string.ascii_letters + string.digits + "+-."


def read_call(source: TextSource) -> Steps[None]:
    """Read one call. Raises NotThisFormat for anything else, also for one without name or arguments."""
    yield from expect(source, "{")
    name, arguments = "", None
    while True:
        yield from skip_space(source)
        key = yield from _value(source)
        yield from expect(source, ":")
        yield from skip_space(source)
        if key in _ARGUMENTS and arguments is None:
            if name and (yield from next_char(source)) == "{":
                yield CallStart(name)
                yield from read_arguments(source)
                yield from _tail(source)
                return
            arguments = _as_object((yield from _raw_value(source)))
        elif key == "name" and not name:
            name = _as_name((yield from _value(source)))
        elif isinstance(key, str):
            yield from _raw_value(source)
        else:
            raise NotThisFormat
        if not (yield from accept(source, ",")):
            break
    yield from expect(source, "}")
    if not name or arguments is None:
        raise NotThisFormat
    yield CallStart(name)
    yield Arguments(arguments)


def read_calls(source: TextSource) -> Steps[None]:
    """Read an array of calls. Raises NotThisFormat when it does not begin with one; what is wrong later is content."""
    yield from expect(source, "[")
    yield from read_call(source)
    source.mark()
    while (yield from accept(source, ",")) and (yield from attempt(source, read_call)):
        source.mark()
    yield from accept(source, "]")


def read_arguments(source: TextSource) -> Steps[None]:
    """Read one JSON object and give it out as it comes; the text may end within it."""
    extent = JsonExtent()
    while True:
        end = extent.end_in(source.rest)
        if piece := source.take(end):
            yield Arguments(piece)
        if end is not None or source.closed:
            return
        yield None


def _tail(source: TextSource) -> Steps[None]:
    """Read what follows the arguments in their object; what does not belong there is left to be content."""
    source.mark()
    try:
        while (yield from accept(source, ",")):
            yield from skip_space(source)
            yield from _value(source)
            yield from expect(source, ":")
            yield from skip_space(source)
            yield from _raw_value(source)
        yield from expect(source, "}")
    except NotThisFormat:
        source.rewind()


def _value(source: TextSource) -> Steps[Any]:
    return decoded((yield from _raw_value(source)))


def _raw_value(source: TextSource) -> Steps[str]:
    """Return the text of one JSON value."""
    first = yield from next_char(source)
    if first not in ("{", "[", '"'):
        scalar = yield from word(source, _SCALAR)
        decoded(scalar)
        return scalar
    extent, pieces = JsonExtent(), []
    while True:
        end = extent.end_in(source.rest)
        pieces.append(source.take(end))
        if end is not None:
            return "".join(pieces)
        if source.closed:
            raise NotThisFormat
        yield None


def _as_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise NotThisFormat
    return value


def _as_object(raw: str) -> str:
    """Return arguments as the text of an object: some models write them as a string, or null for none."""
    value = decoded(raw)
    if isinstance(value, str):
        raw = value
        value = decoded(raw)
    if value is None:
        return json.dumps({})
    if not isinstance(value, dict):
        raise NotThisFormat
    return raw
