"""The grammar of `--source_loras`, which is that of OVMS's image generation.

    alias=SRC[:alpha]                an adapter: a folder or a hub id
    alias=@other[:alpha]+@other…     a composite: a weighted sum of adapters named in the same list

Items are separated by commas.
"""

from __future__ import annotations

import difflib

from ovms_lora.core.config import CompositeComponent, CompositeEntry
from ovms_lora.core.errors import ConfigError, UsageError
from ovms_lora.core.names import check_alias
from ovms_lora.core.strength import MAX_STRENGTH, is_strength
from ovms_lora.export.request import RuntimeSource, SourceLoras

_HINT = 'it looks like "sql=loras/sql,tools=org/tools:0.8,mix=@sql:0.7+@tools:0.5"'


def parse_source_loras(text: str) -> SourceLoras:
    """Parse the value of `--source_loras`. Raises UsageError with the item that is wrong."""
    adapters: list[RuntimeSource] = []
    composites: list[CompositeEntry] = []
    for item in text.split(","):
        alias, equals, value = (part.strip() for part in item.strip().partition("="))
        if not equals or not value:
            raise UsageError(f"--source_loras: {item.strip()!r} is not alias=SOURCE", hint=_HINT)
        _check_alias(alias)
        if value.startswith("@"):
            composites.append(_composite(alias, value))
        else:
            source, alpha = split_strength(value, ":")
            adapters.append(RuntimeSource(alias, source, alpha if alpha is not None else 1.0))
    _check_names(adapters, composites)
    return SourceLoras(tuple(adapters), tuple(composites))


def split_strength(text: str, separator: str) -> tuple[str, float | None]:
    """Split `SRC<separator>NUMBER` at the last separator; (text, None) where no number follows it."""
    source, found, number = text.rpartition(separator)
    if not found or not source:
        return text, None
    try:
        strength = float(number)
    except ValueError:
        return text, None  # the separator is part of the path
    if not is_strength(strength):
        message = f"{text!r}: {number} is not between {-MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
        raise UsageError(message, hint="1.0 is the adapter as it was trained")
    return source, strength


def _check_alias(alias: str) -> None:
    try:
        check_alias(alias)
    except ConfigError as error:
        raise UsageError(f"--source_loras: {error.message}", hint=error.hint) from error


def _composite(alias: str, value: str) -> CompositeEntry:
    components = []
    for part in value.split("+"):
        name, alpha = split_strength(part.strip(), ":")
        if not name.startswith("@") or ":" in name:
            raise UsageError(f"--source_loras: {part.strip()!r} of {alias!r} is not @alias:alpha", hint=_HINT)
        _check_alias(name[1:])
        components.append(CompositeComponent(adapter_alias=name[1:], alpha=alpha))
    return CompositeEntry(alias=alias, components=components)


def _check_names(adapters: list[RuntimeSource], composites: list[CompositeEntry]) -> None:
    known = {adapter.alias for adapter in adapters}
    names = [adapter.alias for adapter in adapters] + [composite.alias for composite in composites]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--source_loras names {name!r} twice", hint=_HINT)
    for composite in composites:
        for component in composite.components:
            alias = component.adapter_alias
            if alias not in known:
                fault = "is a composite itself, and not an adapter" if alias in names else "is not in the list"
                message = f"--source_loras: {composite.alias!r} names {alias!r}, which {fault}"
                raise UsageError(message, hint=_meant(alias, known))


def _meant(alias: str, known: set[str]) -> str:
    near = difflib.get_close_matches(alias, sorted(known), n=1)
    return f"did you mean {near[0]}?" if near else _HINT
