"""Log lines: to stderr, each with the id of its request, control bytes escaped.

Owns the format. What is logged stands elsewhere; prompts and keys never are.
"""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar

LEVELS = ("error", "warning", "info", "debug")

# The id of the request that the running task works on.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Formatter(logging.Formatter):
    """One line per record, a traceback after it; a client's bytes cannot begin a line of their own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s [%(request_id)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        record.request_id = request_id.get()
        return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", super().formatMessage(record))


def configure(level: str) -> None:
    """Send the log of this process to stderr, from `level` on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("ovms_lora", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())
