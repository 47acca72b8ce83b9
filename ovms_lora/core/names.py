"""Names of models and adapters: what is allowed, and how `<base>:<alias>` splits."""

from __future__ import annotations

import re

from ovms_lora.core.errors import ConfigError

# OVMS keeps these for its own parts of a pipeline.
RESERVED_NAMES = frozenset({"text", "image", "audio"})

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def check_alias(alias: str) -> str:
    """Return the alias if it may name an adapter or composite; raise ConfigError otherwise."""
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(f"adapter alias {alias!r} is not valid", hint=f"an alias matches {_ALIAS.pattern}")
    if alias in RESERVED_NAMES:
        raise ConfigError(f"adapter alias {alias!r} is reserved", hint="choose another alias")
    return alias


def is_alias(name: str) -> bool:
    """Whether a name may name an adapter or composite."""
    return _ALIAS.fullmatch(name) is not None and name not in RESERVED_NAMES


def check_model_name(name: str) -> str:
    """Return the name if it may name a model; raise ConfigError otherwise.

    Model names may hold `/`, but no empty, `.` or `..` part: they also name folders of a repository.
    """
    if not _MODEL_NAME.fullmatch(name) or any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(f"model name {name!r} is not valid", hint=f"a model name matches {_MODEL_NAME.pattern}")
    return name


def split_model(model: str) -> tuple[str, str | None]:
    """Split what a client put in `model` at the first colon: (base, alias), alias None without a colon."""
    base, colon, alias = model.partition(":")
    return (base, alias) if colon else (model, None)
