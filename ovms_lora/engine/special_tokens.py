"""SpecialTokens: keeps what clients write from becoming control tokens.

A chat template writes `<|im_end|>` to end a message; a client who writes the same string must not end it. In the
rendered text the two look alike. So marks are put into the strings of a request before they are rendered, inside of
everything that is, or could join its neighbours to, a special token. A token of the rendered text that lies over a
mark is then encoded as the plain text it is.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Digits outlive what templates do with strings: case, JSON, escapes. No text holds these by chance or on purpose.
_MARK = str(10**23 + secrets.randbelow(9 * 10**23))


@dataclass(frozen=True, slots=True)
class Unmarked:
    """A rendered text without its marks, and where they stood."""

    text: str
    places: tuple[int, ...] = ()

    def inside(self, start: int, end: int) -> bool:
        """Whether a mark stood between the characters of this span."""
        return bisect_right(self.places, start) < bisect_right(self.places, end - 1)


class SpecialTokens:
    """The special tokens of one tokenizer: `texts` by id, and `plain_ids`, what each text is where it is only text."""

    def __init__(self, texts: Mapping[int, str], plain_ids: Mapping[int, list[int]]) -> None:
        # A single character cannot be taken apart, and is its own plain text.
        texts = {number: text for number, text in texts.items() if len(text) > 1}
        self.plain_ids = {number: plain_ids[number] for number in texts}
        self.ids = {text: number for number, text in texts.items()}
        self._pattern = re.compile(_any_of(set(self.ids))) if texts else None
        self._heads = {text[:size] for text in texts.values() for size in range(1, len(text))}
        self._tails = {text[size:] for text in texts.values() for size in range(1, len(text))}
        self._longest = max(map(len, texts.values()), default=0)

    def __contains__(self, text: str) -> bool:
        return text in self.ids

    def mark(self, value: Any) -> Any:
        """Return a JSON value whose strings hold marks where they need any."""
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self._marked(key): self.mark(item) for key, item in value.items()}
        return value

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where special tokens stand in a text, from left to right."""
        return [found.span() for found in self._pattern.finditer(text)] if self._pattern else []

    def _marked(self, text: str) -> str:
        if self._pattern is None:
            return text
        marked = self._pattern.sub(_split, text)
        while marked != text:  # tokens may overlap
            text, marked = marked, self._pattern.sub(_split, marked)
        sizes = range(1, min(self._longest, len(text) + 1))
        # Tokens that begin or end like a word are left alone: roles and keys have to stay what they are.
        before = any(text[:size] in self._tails and not text[size - 1].isalnum() for size in sizes)
        after = any(text[-size:] in self._heads and not text[-size].isalnum() for size in sizes)
        return f"{_MARK if before else ''}{text}{_MARK if after else ''}"


def _split(found: re.Match[str]) -> str:
    return found[0][0] + _MARK + found[0][1:]


def _any_of(words: set[str]) -> str:
    """Return a regular expression for the longest of some words; it tries each character once."""
    branches = [
        re.escape(first) + _any_of({word[1:] for word in words if word[:1] == first})
        for first in sorted({word[0] for word in words if word})
    ]
    if len(branches) <= 1 and "" not in words:
        return "".join(branches)
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}"


def unmark(text: str) -> Unmarked:
    """Take the marks out of a rendered text."""
    pieces = text.split(_MARK)
    places, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        places.append(at)
    return Unmarked("".join(pieces), tuple(places))
