"""Watchdog: ends the process when an engine or the event loop hangs, so that whoever supervises it starts another.

    live ──► the timer begins anew            not live ──► the stacks of all threads to stderr; the timer runs on
    the timer has run out ──► the stacks again, exit code 1

A step that hangs in native code cannot be cut short from within. The timer is one of faulthandler's: it needs neither
the event loop nor the interpreter's lock. Knows nothing of what makes a server live.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import time

log = logging.getLogger(__name__)

_STDERR = 2
_ARM_SECONDS = 1.0


class Watchdog:
    """Allows `seconds` without a sign of life. Stacks name files and lines, never values."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._every = min(_ARM_SECONDS, seconds / 4)
        self._armed = -math.inf
        self._told = False

    def look(self, *, live: bool) -> None:
        """Note whether the server is live; to be called several times a second."""
        if live:
            self._told = False
            self._arm()
        elif not self._told:
            self._told = True
            log.critical("the engine hangs: the process ends in %.0f s unless it goes on; all stacks:", self._seconds)
            faulthandler.dump_traceback(_STDERR)

    def stop(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        now = time.monotonic()
        if now - self._armed >= self._every:
            self._armed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)
