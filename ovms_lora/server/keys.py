"""API keys: read from a file or the environment, kept as hashes.

    secret-1                         one key a line
    secret-2

    {"tenants": [{"name": "search", "keys": ["secret-3"], "models": ["base_model", "sql"], "queue_share": 0.25}]}

Owns the two forms of the file. No message holds a key.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ovms_lora.core.config_fault import fault_of
from ovms_lora.core.errors import ConfigError, UsageError
from ovms_lora.core.names import check_alias, check_model_name, split_model
from ovms_lora.core.strict_model import StrictModel, checked, unique_keys
from ovms_lora.server.tenants import PUBLIC, Tenant

_LONGEST = 1024
_HINT = "a tenant has name and keys, and may have models and queue_share; SECURITY.md describes the file"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the server knows it: its hash, and whose it is."""

    digest: bytes = field(repr=False)
    tenant: Tenant = PUBLIC


def digest_of(key: str) -> bytes:
    """Return the hash of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def plain_keys(*keys: str) -> tuple[ApiKey, ...]:
    """Return keys without a tenant."""
    return tuple(ApiKey(digest_of(key)) for key in keys)


def key_of_environment(variable: str, value: str) -> tuple[ApiKey, ...]:
    """Return the key that an environment variable holds, if any. Raises UsageError."""
    key = value.strip()
    if key and not _is_key(key):
        raise UsageError(f"{variable} holds no key", hint="a key is printable ASCII without spaces")
    return plain_keys(key) if key else ()


def read_keys(flag: str, path: Path, *, tenants: bool) -> tuple[ApiKey, ...]:
    """Return the keys of a file; with `tenants` it may be JSON that names some.

    Raises UsageError when the file cannot be read, holds no key, or something that is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {flag} {path}", hint="give a text file with one key a line") from error
    origin = f"{flag} {path}"
    if tenants and text.lstrip().startswith("{"):
        return _of_tenants(origin, text)
    return _of_lines(origin, text)


def _of_lines(origin: str, text: str) -> tuple[ApiKey, ...]:
    keys: list[str] = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line and not _is_key(line):
            raise UsageError(f"{origin}: line {number} is no key", hint="a key is printable ASCII without spaces")
        if line in keys:
            raise UsageError(f"{origin}: line {number} repeats a key", hint="remove the line")
        keys += [line] if line else []
    if not keys:
        raise UsageError(f"{origin} holds no key", hint="write one key a line")
    return plain_keys(*keys)


def _is_key(text: str) -> bool:
    # What a header can carry, and no proxy changes.
    return text.isascii() and text.isprintable() and " " not in text and len(text) <= _LONGEST


def _check_key(text: str) -> str:
    if not text or not _is_key(text):
        raise ConfigError("this is no key", hint="a key is printable ASCII without spaces")
    return text


def _check_name(name: str) -> str:
    base, alias = split_model(name)
    check_model_name(base)
    if alias not in (None, "*"):
        check_alias(str(alias))
    return name


class _Tenant(StrictModel):
    name: Annotated[str, checked(check_alias)]
    keys: Annotated[tuple[Annotated[str, checked(_check_key)], ...], Field(min_length=1)]
    models: tuple[Annotated[str, checked(_check_name)], ...] | None = None
    queue_share: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None


class _Tenants(StrictModel):
    tenants: Annotated[tuple[_Tenant, ...], Field(min_length=1)]


def _of_tenants(origin: str, text: str) -> tuple[ApiKey, ...]:
    try:
        entries = _Tenants.model_validate(json.loads(text, object_pairs_hook=unique_keys)).tenants
    except ValidationError as error:
        fault = fault_of(error)
        hint = _HINT if error.errors()[0]["type"] == "extra_forbidden" else fault.hint
        raise UsageError(f"{origin}: {fault.place}: {fault.message}", hint=hint) from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise UsageError(f"{origin} is not valid JSON: {reason}", hint=_HINT) from None
    if name := _repeated(entry.name for entry in entries):
        raise UsageError(f"{origin}: two tenants are named {name!r}", hint="give one of them another name")
    if _repeated(key for entry in entries for key in entry.keys):
        raise UsageError(f"{origin}: a key stands twice", hint="a key belongs to one tenant, and is listed once")
    owners = [(_tenant(entry, entries), entry.keys) for entry in entries]
    return tuple(ApiKey(digest_of(key), tenant) for tenant, keys in owners for key in keys)


def _tenant(entry: _Tenant, entries: tuple[_Tenant, ...]) -> Tenant:
    # By default the shares add up to the whole queue: each tenant can always have its own.
    names = None if entry.models is None else frozenset(entry.models)
    return Tenant(entry.name, names, entry.queue_share or 1 / len(entries))


def _repeated(values: Iterable[str]) -> str | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
