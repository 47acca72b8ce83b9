"""Log lines: to stderr, each with the id of its request, control bytes escaped.

Owns the format, also that of tracebacks: what an unexpected error says of a request may quote it, so only errors that
are made for clients keep their words. What is logged stands elsewhere; prompts and keys never are.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from contextvars import ContextVar
from types import TracebackType

from ovms_lora.core.errors import OvmsLoraError

LEVELS = ("error", "warning", "info", "debug")

# The id of the request that the running task works on.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Formatter(logging.Formatter):
    """One line per record, a traceback after it; a client's bytes cannot begin a line of their own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        record.exc_text = None  # another handler may have left its own form of the traceback here
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        record.request_id = request_id.get()
        return _escaped(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:
        """Return the traceback, each of its lines indented: none looks like one of the log."""
        return "\n".join(f"  {_escaped(line)}" for line in _traceback(ei[1]))


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _traceback(error: BaseException | None) -> list[str]:
    """Return where an error and those that led to it were raised, the first of them first."""
    lines: list[str] = []
    seen: set[BaseException] = set()
    while error is not None and error not in seen:
        seen.add(error)
        here = [line for entry in traceback.format_tb(error.__traceback__) for line in entry.splitlines()]
        lines = [*here, _described(error), *(["which led to:"] if lines else []), *lines]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return lines


def _described(error: BaseException) -> str:
    """Return what an error says; of one that a request has caused and nobody foresaw, only what it is."""
    name = type(error).__qualname__
    foreseen = isinstance(error, OvmsLoraError) or request_id.get() == "-"
    return f"{name}: {error}" if foreseen else name


def configure(level: str) -> None:
    """Send the log of this process to stderr, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("ovms_lora", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())
