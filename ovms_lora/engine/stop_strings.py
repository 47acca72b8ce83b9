"""StopStrings: ends a text at the first stop string, also when that string arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """Text that may be given out now, and the stop string that ends it (None: it goes on)."""

    text: str
    stopped_by: str | None = None


class StopStrings:
    """Watches one growing text. What could still become a stop string is held back until that is decided."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def add(self, text: str) -> Cut:
        """Take more text; return what can be given out of it and of what was held back."""
        if not self._stops:
            return Cut(text)
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held, cut = "", self._held[: at + len(stop) if self._include else at]
            return Cut(cut, stop)
        keep = open_end(self._held, self._stops)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Cut(given)

    def flush(self) -> str:
        """Return what is held back: the text has ended for another reason."""
        held, self._held = self._held, ""
        return held


def open_end(text: str, strings: Sequence[str]) -> int:
    """Return how many characters at the end of a text are the beginning of one of the strings, and not all of it."""
    longest = max(map(len, strings)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in strings):
            return size
    return 0
