"""JSON of any size without a long hold on the interpreter: the event loop gets its turn between the pieces.

Python's encoder writes a document in one call, during which no other thread runs; a million token ids take it a tenth
of a second. Owns the cutting; small documents are one piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_PIECE = 4096
_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dump_json(document: dict[str, Any]) -> bytes:
    """Return the document as JSON. Raises ValueError for infinities and NaN, which JSON does not have."""
    return "".join(_pieces(document)).encode()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for number, (key, member) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_dumps(key)}:"
            yield from _pieces(member)
        yield "}" if value else "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from _pieces(item)
        yield "]"
    elif isinstance(value, list) and len(value) > _PIECE:
        for start in range(0, len(value), _PIECE):
            yield ("," if start else "[") + _dumps(value[start : start + _PIECE])[1:-1]
        yield "]"
    else:
        yield _dumps(value)
