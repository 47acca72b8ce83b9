"""Bounds on fields that are the operator's to set: each counts something, and may be no more than a limit says.

Owns how a field names its limit, for the check and for JSON Schema; the numbers stand in `options`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ovms_lora.server.options import Limits

_KEY = "x-limit"


@dataclass(frozen=True, slots=True)
class Bound:
    """A check of a field behind those of its type: `size` of the value is at most the limit of this name.

    `{limit}` in the message is the number.
    """

    limit: str
    message: str
    size: Callable[[Any], int] = len
    least: int = 0

    def check(self, value: Any, limits: Limits) -> Any:
        """Return the value. Raises ValueError."""
        most: int = getattr(limits, self.limit)
        if not self.least <= self.size(value) <= most:
            raise ValueError(self.message.format(limit=most))
        return value


def at_most(keyword: str, limit: str) -> dict[str, Any]:
    """Return how JSON Schema says such a bound, with the default; `with_limits` puts the number of a server there."""
    return {keyword: getattr(Limits(), limit), _KEY: {keyword: limit}}


def with_limits(schema: Any, limits: Limits) -> Any:
    """Return a schema, or whatever holds some, with the numbers of a server."""
    if isinstance(schema, list):
        return [with_limits(part, limits) for part in schema]
    if not isinstance(schema, dict):
        return schema
    named = schema.get(_KEY, {})
    parts = {key: with_limits(part, limits) for key, part in schema.items() if key != _KEY}
    return parts | {keyword: getattr(limits, limit) for keyword, limit in named.items()}
