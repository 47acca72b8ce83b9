"""What is wrong with a configuration file, of all that pydantic reports: the first fault, its place and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

_WORDS = {"extra_forbidden": "unknown key", "missing": "is missing"}
_HINTS = {
    "extra_forbidden": "remove it, or correct its name; config/config.schema.json lists the keys",
    "missing": "add it",
    "too_long": "remove its items: only language models are served",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; `place` is the way to it through the document, as `key.0.key`."""

    place: str
    message: str
    hint: str


def fault_of(error: ValidationError) -> Fault:
    """Return the first fault, on one line each."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    parts = [*map(str, first["loc"]), *filter(None, [context.get("at")])]
    kind = first["type"]
    return Fault(
        _printable(".".join(parts)) or "the document",
        _WORDS.get(kind, first["msg"]),
        context.get("hint") or _HINTS.get(kind, "correct the value of that key"),
    )


def _printable(text: str) -> str:
    """Escape what a key of a hostile file may bring into a log."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
