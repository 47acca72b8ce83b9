"""Detokenizer: the text of one growing sequence, token by token, never half a character.

Two ways, with the same text: where a text is just the bytes of its tokens, they are joined; for other decoders the
text of a window of recent tokens is taken again and again. Knows tokenizers only by what they say of tokens.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence
from typing import Protocol, Self

from ovms_lora.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CHARACTER = 4  # bytes, and so tokens, of the longest character
_MOST_OPEN = 16  # more tokens than this are no character; holding them back would cost more with each one


class Detokenizer(Protocol):
    """The text of one sequence."""

    def add(self, token_id: int) -> str:
        """Take one more token; return the text that it completes, perhaps none."""

    def flush(self) -> str:
        """Return the text that is still held back; what never became a character is given as U+FFFD."""

    def fork(self) -> Self:
        """Return another one that goes on from here."""


def detokenizer(tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
    """Return the detokenizer of a sequence that goes on from a prompt."""
    kind = ByteDetokenizer if tokenizer.joins_bytes else WindowDetokenizer
    return kind(tokenizer, prompt, skip_special_tokens=skip_special_tokens)


class ByteDetokenizer:
    """For tokenizers that join bytes: far faster than asking for windows, and the same text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt[-_CHARACTER:]:  # it may end within a character, which then is completed
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """Take one more token; see Detokenizer."""
        return "" if token_id in self._hidden else self._decoder.decode(self._tokenizer.decoded_bytes(token_id))

    def flush(self) -> str:
        """Return what is held back; see Detokenizer."""
        return self._decoder.decode(b"", final=True)

    def fork(self) -> Self:
        """Return another one; see Detokenizer."""
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        other._decoder.setstate(self._decoder.getstate())
        return other


class WindowDetokenizer:
    """For any decoder.

    A token may hold part of a character, and some tokenizers write a token differently after another one. So the text
    of a window of recent tokens is taken with and without the new tokens, and what is longer is new; while it ends in
    an incomplete character, nothing is given out.
    """

    # Enough for what a decoder looks back on: a leading space that is dropped only at the beginning of a text.
    _CONTEXT = 5
    _WINDOW = 12  # when it is longer it is cut to the context, which takes a decoding of its own

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._open: list[int] = []
        self._known: list[int] = []
        self._known_text = ""
        self._remember(list(prompt[-self._CONTEXT - _CHARACTER :]))

    def add(self, token_id: int) -> str:
        """Take one more token; see Detokenizer."""
        self._open.append(token_id)
        text = self._decode(self._known + self._open)
        if text.endswith(_REPLACEMENT) and len(self._open) < _MOST_OPEN:
            return ""
        return self._settle(text)

    def fork(self) -> WindowDetokenizer:
        """Return another one; see Detokenizer."""
        other = copy.copy(self)
        other._open = list(self._open)
        return other

    def flush(self) -> str:
        """Return what is held back; see Detokenizer."""
        return self._settle(self._decode(self._known + self._open)) if self._open else ""

    def _settle(self, text: str) -> str:
        new = text[len(self._known_text) :]
        self._known, self._known_text, self._open = self._known + self._open, text, []
        if len(self._known) > self._WINDOW:
            self._remember(self._known)
        return new

    def _remember(self, token_ids: list[int]) -> None:
        """Keep the last tokens as the window, beginning with a whole character where there is one.

        Decoders with byte fallback write a run of byte tokens as U+FFFD as a whole when it begins within a character.
        """
        for size in range(self._CONTEXT, self._CONTEXT + _CHARACTER):
            self._known = token_ids[-size:]
            self._known_text = self._decode(self._known)
            if not self._known_text.startswith(_REPLACEMENT):
                break

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
