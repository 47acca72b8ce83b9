"""FaultLog: says once what is wrong with a file that is looked at again and again."""

from __future__ import annotations

import logging
import re

from ovms_lora.core.errors import OvmsLoraError

_JSON_PLACE = re.compile(r": line \d+ column \d+ \(char \d+\)$")
_MOST_FAULTS = 100  # of a file that changes all the time and is never usable


class FaultLog:
    """Each fault is logged the first time that it is seen since the file was usable.

    A file that is read while it is written is broken each time at another place; that is one fault.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._seen: set[str] = set()

    def report(self, error: OvmsLoraError) -> None:
        """Log a fault, unless it is known."""
        fault = _JSON_PLACE.sub("", error.message)
        if fault in self._seen or len(self._seen) >= _MOST_FAULTS:
            return
        self._seen.add(fault)
        hint = f" (hint: {error.hint})" if error.hint else ""
        self._log.error("%s: %s%s", self._what, error.message, hint)

    def clear(self) -> None:
        """Note that the file is usable."""
        self._seen.clear()
