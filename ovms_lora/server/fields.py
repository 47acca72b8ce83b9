"""The rules of request fields: small checks that a dialect's table is written with.

A check takes a value, returns it (perhaps converted) or raises ValueError with the message for the client. Most are
rules: they also say in JSON Schema what they take, and the OpenAPI document is made of that. Owns the checks; which
field has which, with which words, stands in `v3_fields` and `v1_fields`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.server.bounds import Bound
from ovms_lora.server.options import Limits

Check = Callable[[Any], Any]
Schema = dict[str, Any]
Values = dict[str, Any]

UINT32_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1

_DEFAULTS = Limits()
# How OVMS calls in its messages what a model does to guess ahead.
PROMPT_LOOKUP = "prompt lookup decoding"
DRAFT_MODEL = "Fast Draft speculative decoding"

_LIMIT = re.compile(r"\{limits\.(\w+)\}")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the served model and the server allow, for the rules that depend on it.

    `assistance` is how the model guesses ahead, or None.
    """

    max_tokens_limit: int | None = None
    best_of_limit: int = 20
    takes_adapters: bool = False
    server: Limits = _DEFAULTS
    assistance: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A check that tells what it takes: whatever does not fit `schema` is refused. It may refuse more than that."""

    check: Check
    schema: Schema

    def __call__(self, value: Any) -> Any:
        """Check a value."""
        return self.check(value)


def takes(schema: Schema) -> Callable[[Check], Rule]:
    """Decorate a check with what it takes."""
    return lambda check: Rule(check, schema)


def schema_of(*checks: Check | Bound) -> Schema:
    """Return what passes all these checks, as far as they tell."""
    schema: Schema = {}
    for check in checks:
        schema |= check.schema if isinstance(check, Rule) else {}
    return schema


@dataclass(frozen=True, slots=True)
class OnlyWith:
    """What a field needs beside it: a field further up in the table that is true; else the message."""

    name: str
    message: str


@dataclass(frozen=True, slots=True, init=False)
class Field:
    """One row of a table: a field and its checks, applied in order; bounds that the server sets may be among them.

    `null` False makes null a value like others; `missing` is the message where a field that is required is left out.
    `only_with` is asked before the checks.
    """

    name: str
    checks: tuple[Check | Bound, ...]
    null: bool
    missing: str | None
    only_with: OnlyWith | None

    def __init__(
        self,
        name: str,
        *checks: Check | Bound,
        null: bool = True,
        missing: str | None = None,
        only_with: OnlyWith | None = None,
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "checks", checks)
        object.__setattr__(self, "null", null)
        object.__setattr__(self, "missing", missing)
        object.__setattr__(self, "only_with", only_with)

    @property
    def schema(self) -> Schema:
        """What the field takes."""
        schema = schema_of(*self.checks)
        can_be_null = self.null and self.missing is None
        return {"anyOf": [schema, {"type": "null"}]} if schema and can_be_null else schema


@dataclass(frozen=True, slots=True)
class Together:
    """A rule over several fields: where `broken`, the message; `{limits.…}` in it is filled in."""

    param: str
    broken: Callable[[Values, ModelLimits], bool]
    message: str

    @property
    def told(self) -> str:
        """The message with the names of the limits in it, for documentation."""
        return _LIMIT.sub(r"<\1>", self.message)


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
            if field.only_with is not None and values.get(field.only_with.name) is not True:
                raise InvalidFieldError(field.only_with.message, param=field.name)
            values[field.name] = _checked(field, value, limits.server)
        for field in self.fields:
            if field.missing is not None and field.name not in values:
                raise InvalidFieldError(field.missing, param=field.name)
        for rule in self.together:
            if rule.broken(values, limits):
                raise InvalidFieldError(rule.message.format(limits=limits), param=rule.param)
        return values

    @property
    def names(self) -> frozenset[str]:
        """The fields that this table knows."""
        return frozenset(field.name for field in self.fields)

    @property
    def schema(self) -> Schema:
        """What the fields take, each by itself; the rules over several of them are told in words."""
        rules = [f"- `{field.name}`: {field.only_with.message}" for field in self.fields if field.only_with]
        rules += [f"- `{rule.param}`: {rule.told}" for rule in self.together]
        schema: Schema = {"type": "object", "properties": {field.name: field.schema for field in self.fields}}
        if required := [field.name for field in self.fields if field.missing is not None]:
            schema["required"] = required
        if rules:
            schema["description"] = "Rules over several fields, by the message when one is broken:\n\n" + "\n".join(
                rules
            )
        return schema


def _checked(field: Field, value: Any, limits: Limits) -> Any:
    try:
        for check in field.checks:
            value = check.check(value, limits) if isinstance(check, Bound) else check(value)
    except ValueError as error:
        raise InvalidFieldError(str(error), param=field.name) from error
    return value


def number(message: str) -> Check:
    """A finite JSON number."""

    @takes({"type": "number"})
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
    return Rule(_instance(int, message), {"type": "integer"})


def boolean(message: str) -> Check:
    """True or false."""
    return Rule(_instance(bool, message), {"type": "boolean"})


def text(message: str) -> Check:
    """A string."""
    return Rule(_instance(str, message), {"type": "string"})


def an_object(message: str) -> Check:
    """A JSON object."""
    return Rule(_instance(dict, message), {"type": "object"})


def array(message: str) -> Check:
    """A JSON array."""
    return Rule(_instance(list, message), {"type": "array"})


def _instance(kind: type, message: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(message)
        return value

    return check


def within(low: float, high: float, message: str) -> Check:
    """low ≤ value ≤ high."""
    return that(lambda value: low <= value <= high, message, {"minimum": low, "maximum": high})


def at_least(low: float, message: str) -> Check:
    """Low ≤ value."""
    return that(lambda value: low <= value, message, {"minimum": low})


def that(holds: Callable[[Any], bool], message: str, schema: Schema | None = None) -> Check:
    """Any condition on a value of the right type, and what JSON Schema can say of it."""

    @takes(schema or {})
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(message)
        return value

    return check


def items(*checks: Check) -> Check:
    """Apply checks to every item of an array."""

    @takes({"items": schema_of(*checks)})
    def check(value: Any) -> list[Any]:
        for check_item in checks:
            value = [check_item(item) for item in value]
        return list(value)

    return check


def uint32(not_unsigned: str, too_large: str) -> Check:
    """An integer in [0, 2³²), with OVMS's two messages."""

    @takes({"type": "integer", "minimum": 0, "maximum": UINT32_MAX})
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
    written = {json.dumps(value) for value in harmless}  # in Python 0 is False; in JSON it is not
    schema: Schema = {"enum": list(harmless)} if harmless else {"not": {}}
    return Field(name, that(lambda value: json.dumps(value) in written, f"{name} is not supported", schema))


def given(name: str, *values: Any) -> Callable[[Values, ModelLimits], bool]:
    """Tell whether a field is given, or given with one of these values."""
    return lambda fields, _: name in fields and (not values or fields[name] in values)
