"""TextSource: a growing text with a place in it up to which it has been read.

Owns the search for markers that may come in pieces. A reader that may fail sets a mark first, and goes back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ovms_lora.engine.stop_strings import open_end


@dataclass(frozen=True, slots=True)
class Taken:
    """Text before a marker, and the marker; no marker is the empty string."""

    text: str
    marker: str = ""


class TextSource:
    """Text between the mark and the end is kept, what lies before is forgotten."""

    def __init__(self) -> None:
        self.closed = False
        self._text = ""
        self._at = 0
        self._mark: int | None = None

    def add(self, text: str) -> None:
        """Append text."""
        start = self._at if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._at -= start
        self._mark = None if self._mark is None else 0

    def close(self) -> None:
        """Say that no text follows."""
        self.closed = True

    @property
    def rest(self) -> str:
        """What has not been read yet."""
        return self._text[self._at :]

    @property
    def next(self) -> str:
        """The next character, the empty string at the end of what is there."""
        return self._text[self._at : self._at + 1]

    def take(self, size: int | None = None) -> str:
        """Read so many characters, or all."""
        end = len(self._text) if size is None else self._at + size
        taken, self._at = self._text[self._at : end], min(end, len(self._text))
        return taken

    def take_until(self, markers: Sequence[str], *, hold_space: bool = False) -> Taken:
        """Read up to the first marker, and the marker itself; without one, what cannot belong to it.

        With `hold_space`, white space before a marker is not part of the text, and the mark is set before that space.
        """
        rest = self.rest
        found = [(at, marker) for marker in markers if (at := rest.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            text = self.take(len(rest[:at].rstrip()) if hold_space else at)
            if hold_space:
                self.mark()
            self.take(at - len(text) + len(marker))
            return Taken(text, marker)
        size = len(rest) if self.closed else len(rest) - open_end(rest, markers)
        if hold_space and not self.closed:
            size = len(rest[:size].rstrip())
        return Taken(self.take(size))

    def mark(self) -> None:
        """Remember this place."""
        self._mark = self._at

    def forget(self) -> None:
        """Take the mark away."""
        self._mark = None

    def rewind(self) -> None:
        """Go back to the mark."""
        assert self._mark is not None, "set a mark first"
        self._at = self._mark

    def since_mark(self) -> str:
        """Return what has been read since the mark."""
        assert self._mark is not None, "set a mark first"
        return self._text[self._mark : self._at]
