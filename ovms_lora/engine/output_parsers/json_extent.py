"""JsonExtent: where one JSON value ends, while it is still being written."""

from __future__ import annotations


class JsonExtent:
    """Follows one object, array or string by its brackets and quotes alone: it finds the end, it does not validate."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def end_in(self, text: str) -> int | None:
        """Take more text; return the index after the value's last character, None when it goes on."""
        for index, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = char == "\\"
                self._quoted = char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
            if self._depth <= 0 and not self._quoted:
                return index + 1
        return None
