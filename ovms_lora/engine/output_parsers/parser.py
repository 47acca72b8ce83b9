"""OutputParser: runs a grammar over a text that comes in pieces.

A grammar is a generator that reads a `TextSource`: it yields deltas, and None when it needs more text. So a format is
written down as it is read, from front to back, and works the same on whole texts and on pieces of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from ovms_lora.engine.output_parsers.deltas import Content, Delta
from ovms_lora.engine.output_parsers.text_source import TextSource

T = TypeVar("T")

Steps = Generator[Delta | None, None, T]
Grammar = Callable[[TextSource], Steps[None]]


class OutputParser:
    """The state of one text. Never raises for what a model has written."""

    def __init__(self, grammar: Grammar) -> None:
        self._source = TextSource()
        self._steps = grammar(self._source)

    def feed(self, text: str) -> list[Delta]:
        """Take more text; return what can be said of it by now."""
        self._source.add(text)
        return self._until_blocked()

    def finish(self) -> list[Delta]:
        """Return what was held back: the text has ended."""
        self._source.close()
        return self._until_blocked()

    def _until_blocked(self) -> list[Delta]:
        deltas: list[Delta] = []
        for step in self._steps:
            if step is None:
                break
            deltas.append(step)
        return deltas


def plain(source: TextSource) -> Steps[None]:
    """All text is content."""
    while True:
        if text := source.take():
            yield Content(text)
        if source.closed:
            return
        yield None
