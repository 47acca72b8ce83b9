"""From the bytes of a request to a JSON object with bounded nesting.

Owns what is wrong with a body as a whole; fields are the tables' business.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ovms_lora.core.errors import MalformedBodyError

MAX_NESTING = 100

# An escaped half of a surrogate pair: the only way to get text that is not Unicode out of a JSON document.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body. Raises MalformedBodyError with OVMS's detail."""
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise MalformedBodyError("JSON body exceeds maximum nesting depth") from error
    except ValueError as error:  # JSONDecodeError, UnicodeError and an integer of thousands of digits are all one
        raise MalformedBodyError("Cannot parse JSON body") from error
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and _nests_deeper(document, MAX_NESTING):
        raise MalformedBodyError("JSON body exceeds maximum nesting depth")
    if not isinstance(document, dict):
        raise MalformedBodyError("JSON body must be an object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _nests_deeper(document: Any, depth: int) -> bool:
    containers = _containers([document])
    for _ in range(depth):
        if not containers:
            return False
        containers = [inner for outer in containers for inner in _containers(outer)]
    return bool(containers)


def _containers(values: dict[str, Any] | list[Any]) -> list[dict[str, Any] | list[Any]]:
    items = values.values() if isinstance(values, dict) else values
    return [value for value in items if isinstance(value, dict | list)]
