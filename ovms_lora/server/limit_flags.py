"""The flag `--limit NAME=NUMBER`: which bounds there are, what each means, and how one is changed.

Owns the texts; the numbers and their defaults stand in `options`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from ovms_lora.core.errors import UsageError
from ovms_lora.server.options import Limits

MEANINGS = {
    "connections": "open connections; one more is answered 503 and closed",
    "body_bytes": "a request's body (413)",
    "header_bytes": "names and values of a request's headers together (431), and its address (414)",
    "receive_seconds": "time for a request's head to come, and then for its body (408)",
    "send_seconds": "how long a client may leave what is sent to it unread, before the connection is cut",
    "waiting_requests": "requests that wait for one model (429)",
    "request_seconds": "time for a whole request (504)",
    "drain_seconds": "time for running requests to end after the first signal",
    "heartbeat_seconds": "how long a step may take before the server counts as dead (`/v2/health/live` answers 503)",
    "buffered_outputs": "outputs of a sequence that wait for a slow reader of its stream, before it is dropped",
    "prompts": "prompts of one call, or texts to tokenize (400)",
    "n": "answers to one prompt on `/v1`, and `best_of` there; on `/v3` the model's `best_of_limit` bounds both (400)",
    "stop_strings": "stop strings of a request (400)",
    "stop_characters": "characters of a stop string (400)",
    "logit_bias": "entries of `logit_bias` (400)",
    "schema_bytes": "a JSON schema that the answer must match (400)",
}

_LARGEST = 2**40


def limits_of(changes: Iterable[str]) -> Limits:
    """Return the limits with these changes, each `NAME=NUMBER`. Raises UsageError."""
    changed: dict[str, Any] = {}
    defaults = {field.name: field.default for field in fields(Limits)}
    for change in changes:
        name, separator, text = change.partition("=")
        name = name.replace("-", "_")
        if not separator or name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(defaults)}"
            raise UsageError(f"--limit {change!a} names no limit", hint=hint)
        changed[name] = _number(change, text, whole=isinstance(defaults[name], int))
    return replace(Limits(), **changed)


def _number(change: str, text: str, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not (text.isascii() and 0 < value <= _LARGEST):
        kind = "whole number of 1 or more" if whole else "number above 0"
        raise UsageError(f"--limit {change!a}: not a {kind}", hint="like --limit request_seconds=120")
    return value
