"""JSON from hostile files: one object, bounded, unambiguous.

Refuses what Python's own parser lets pass: repeated keys, NaN and Infinity, numbers of thousands of digits, deep
nesting, and small files that unfold into millions of objects. Knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ovms_lora.adapters.quoting import quoted
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

_LONGEST_NUMBER = 40


class _Refused(ValueError):
    """Something that is JSON to Python, but not to us."""


def parse_object(
    data: bytes, *, what: str, code: AdapterErrorCode, max_containers: int, max_values: int, max_depth: int
) -> dict[str, Any]:
    """Parse UTF-8 `data` as one JSON object; raise AdapterError(`code`) that starts with `what` otherwise.

    `max_containers` bounds how many objects and arrays may open, `max_values` how many values stand in them. Both are
    counted on the raw bytes, before anything is built, so brackets and commas inside of strings count too; nesting is
    bounded the same way, by the parser's own stack first.
    """
    if data.count(b"{") + data.count(b"[") > max_containers:
        raise AdapterError(code, f"{what} holds more than {max_containers} objects and arrays")
    if data.count(b",") > max_values:
        raise AdapterError(code, f"{what} holds more than {max_values} values")
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_short_int,
            parse_float=_short_float,
        )
        if not isinstance(document, dict):
            raise _Refused("it is not an object")
        _check_depth(document, max_depth)
    except RecursionError as error:
        raise AdapterError(code, f"{what} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise AdapterError(code, f"{what} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise AdapterError(code, f"{what} is not valid JSON: {error.msg} at character {error.pos}") from error
    except _Refused as error:
        raise AdapterError(code, f"{what} is not usable JSON: {error}") from error
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"key {quoted(twice)} stands twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not a JSON number")


def _short_int(digits: str) -> int:
    _check_number(digits)
    return int(digits)


def _short_float(digits: str) -> float:
    _check_number(digits)
    return float(digits)


def _check_number(digits: str) -> None:
    if len(digits) > _LONGEST_NUMBER:
        raise _Refused(f"a number has {len(digits)} digits")


def _check_depth(value: Any, remaining: int) -> None:
    if not isinstance(value, (dict, list)):
        return
    if remaining == 0:
        raise _Refused("it is nested too deeply")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, remaining - 1)
