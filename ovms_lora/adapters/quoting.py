"""How text from a hostile file is shown in a message: short, one line, ASCII.

Knows nothing of adapters; every name or value that a file supplied goes through here before anyone reads it.
"""

from __future__ import annotations

_SHOWN = 120


def quoted(value: object) -> str:
    """Return `value` as ASCII in quotes, cut to a length that fits a log line; control characters are escaped."""
    text = value if isinstance(value, str) else repr(value) if isinstance(value, (int, float, bool)) else _kind(value)
    shown = ascii(text[: _SHOWN + 1])
    return shown if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}..."


def _kind(value: object) -> str:
    return "null" if value is None else {"dict": "object", "list": "array"}.get(type(value).__name__, "value")
