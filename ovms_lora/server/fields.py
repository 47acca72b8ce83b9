"""The rules of request fields: small checks that a dialect's table is written with.

A check takes a value, returns it (perhaps converted) or raises ValueError with the message for the client. Owns the
checks; which field has which, with which words, stands in `v3_fields` and `v1_fields`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovms_lora.core.errors import InvalidFieldError

Check = Callable[[Any], Any]
Values = dict[str, Any]

UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model allows, for the rules that depend on it."""

    max_tokens_limit: int | None = None
    best_of_limit: int = 20
    takes_adapters: bool = False


@dataclass(frozen=True, slots=True, init=False)
class Field:
    """One row of a table: a field and its checks, applied in order; `null` False makes null a value like others."""

    name: str
    checks: tuple[Check, ...]
    null: bool

    def __init__(self, name: str, *checks: Check, null: bool = True) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "checks", checks)
        object.__setattr__(self, "null", null)


@dataclass(frozen=True, slots=True)
class Together:
    """A rule over several fields: where `broken`, the message; `{limits.…}` in it is filled in."""

    param: str
    broken: Callable[[Values, ModelLimits], bool]
    message: str


@dataclass(frozen=True, slots=True)
class Table:
    """All rules of one endpoint."""

    fields: tuple[Field, ...]
    together: tuple[Together, ...]

    def read(self, document: Mapping[str, Any], limits: ModelLimits) -> Values:
        """Return the fields that are given, checked; absent and null ones are left out.

        Raises InvalidFieldError with the message of the first rule that is broken.
        """
        values: Values = {}
        for field in self.fields:
            value = document.get(field.name)
            if field.name not in document or (value is None and field.null):
                continue
            values[field.name] = _checked(field, value)
        for rule in self.together:
            if rule.broken(values, limits):
                raise InvalidFieldError(rule.message.format(limits=limits), param=rule.param)
        return values

    @property
    def names(self) -> frozenset[str]:
        """The fields that this table knows."""
        return frozenset(field.name for field in self.fields)


def _checked(field: Field, value: Any) -> Any:
    try:
        for check in field.checks:
            value = check(value)
    except ValueError as error:
        raise InvalidFieldError(str(error), param=field.name) from error
    return value


def number(message: str) -> Check:
    """A finite JSON number."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(message)
        try:
            converted = float(value)
        except OverflowError:
            raise ValueError(message) from None
        if not math.isfinite(converted):
            raise ValueError(message)
        return converted

    return check


def integer(message: str) -> Check:
    """A JSON integer: neither a fraction nor a bool."""
    return _instance(int, message)


def boolean(message: str) -> Check:
    """True or false."""
    return _instance(bool, message)


def text(message: str) -> Check:
    """A string."""
    return _instance(str, message)


def an_object(message: str) -> Check:
    """A JSON object."""
    return _instance(dict, message)


def array(message: str) -> Check:
    """A JSON array."""
    return _instance(list, message)


def _instance(kind: type, message: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(message)
        return value

    return check


def within(low: float, high: float, message: str) -> Check:
    """low ≤ value ≤ high."""
    return that(lambda value: low <= value <= high, message)


def at_least(low: float, message: str) -> Check:
    """Low ≤ value."""
    return that(lambda value: low <= value, message)


def that(holds: Callable[[Any], bool], message: str) -> Check:
    """Any condition on a value of the right type."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(message)
        return value

    return check


def items(check_item: Check) -> Check:
    """Apply a check to every item of an array."""
    return lambda value: [check_item(item) for item in value]


def uint32(not_unsigned: str, too_large: str) -> Check:
    """An integer in [0, 2³²), with OVMS's two messages."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(not_unsigned)
        if value > UINT32_MAX:
            raise ValueError(too_large)
        return value

    return check


def needs_adapters(name: str) -> Together:
    """A field that only means something for a model with runtime adapters; the message is OVMS's."""
    return Together(
        name,
        lambda fields, limits: name in fields and not limits.takes_adapters,
        f"{name} is not supported when no dynamic LoRA adapters are available.",
    )


def unsupported(name: str, *harmless: Any) -> Field:
    """A field that would change the answer but cannot yet: refused unless its value is a harmless one."""
    return Field(name, that(lambda value: value in harmless, f"{name} is not supported"))


def given(name: str, *values: Any) -> Callable[[Values, ModelLimits], bool]:
    """Tell whether a field is given, or given with one of these values."""
    return lambda fields, _: name in fields and (not values or fields[name] in values)
