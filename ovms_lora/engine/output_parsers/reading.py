"""The words that grammars are written with: literals, texts up to a marker, JSON values, attempts.

All of them wait for more text by yielding None. A reader raises NotThisFormat where the text is something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ovms_lora.engine.output_parsers.deltas import Content, Delta
from ovms_lora.engine.output_parsers.parser import Steps
from ovms_lora.engine.output_parsers.text_source import TextSource


class NotThisFormat(Exception):
    """The text is not what the reader reads. Never leaves a grammar: `attempt` makes content of the text."""


Reader = Callable[[TextSource], Steps[None]]


def attempt(source: TextSource, reader: Reader) -> Steps[bool]:
    """Read something that begins at the mark; tell whether it was that. If not, all of it is content.

    So the reader fails, if at all, before it gives out anything.
    """
    try:
        yield from reader(source)
    except NotThisFormat:
        yield Content(source.since_mark())
        return False
    finally:
        source.forget()
    return True


def pass_until(source: TextSource, marker: str, kind: Callable[[str], Delta]) -> Steps[bool]:
    """Give text out until the marker; tell whether it came."""
    while True:
        taken = source.take_until((marker,))
        if taken.text:
            yield kind(taken.text)
        if taken.marker or source.closed:
            return bool(taken.marker)
        yield None


def content_until(source: TextSource, *markers: str) -> Steps[str]:
    """Give content out until one of the markers, and return it; the empty string at the end of the text.

    White space before a marker is left out. The mark is set before it, so that a failing attempt loses nothing.
    """
    source.forget()
    while True:
        taken = source.take_until(markers, hold_space=True)
        if taken.text:
            yield Content(taken.text)
        if taken.marker or source.closed:
            return taken.marker
        yield None


def text_until(source: TextSource, marker: str) -> Steps[str]:
    """Return the text before a marker. Raises NotThisFormat when it never comes."""
    pieces = []
    while True:
        taken = source.take_until((marker,))
        pieces.append(taken.text)
        if taken.marker:
            return "".join(pieces)
        if source.closed:
            raise NotThisFormat
        yield None


def skip_space(source: TextSource) -> Steps[None]:
    """Read over white space."""
    while True:
        rest = source.rest
        source.take(len(rest) - len(rest.lstrip()))
        if source.next or source.closed:
            return
        yield None


def accept(source: TextSource, literal: str) -> Steps[bool]:
    """Read a literal, and white space before it, if that is what comes next."""
    while True:
        rest = source.rest
        stripped = rest.lstrip()
        if stripped.startswith(literal):
            source.take(len(rest) - len(stripped) + len(literal))
            return True
        if source.closed or not literal.startswith(stripped):
            return False
        yield None


def expect(source: TextSource, literal: str) -> Steps[None]:
    """Read a literal, and white space before it. Raises NotThisFormat."""
    if not (yield from accept(source, literal)):
        raise NotThisFormat


def next_char(source: TextSource) -> Steps[str]:
    """Return the next character without reading it; the empty string at the end of the text."""
    while not source.next and not source.closed:
        yield None
    return source.next


def word(source: TextSource, characters: Sequence[str]) -> Steps[str]:
    """Read the longest run of these characters."""
    pieces = []
    while (char := (yield from next_char(source))) and char in characters:
        pieces.append(source.take(1))
    return "".join(pieces)


def decoded(raw: str) -> Any:
    """Return the value of JSON text. Raises NotThisFormat."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise NotThisFormat from error
