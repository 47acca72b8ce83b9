"""From a ConstraintSpec to a grammar of llguidance, with bounds on what a client may send.

llguidance bounds its own work by numbers of steps, but it recurses along nesting and references, and some work grows
with the square of the source. So the source is bounded here, before it gets there. Owns the bounds and the
translation; knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, grammar_from

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec

MAX_SCHEMA_BYTES = 128 * 1024
MAX_CHOICE_BYTES = 128 * 1024
# `a?a?a?…` takes the square of its length: 8 KiB half a second.
MAX_REGEX_BYTES = 8 * 1024
MAX_GRAMMAR_BYTES = 8 * 1024
# While a text is forced, each step looks ahead over all that is left of it.
MAX_STRING_BYTES = 8 * 1024
MAX_NESTING = 100
# Levels of nesting, each definition within the one that refers to it: what the recursion of a compilation may reach.
MAX_LEVELS = 8000
# Multiples of n are found by an automaton of n states; 10,000 take 50 ms, a million most of a minute.
MAX_MULTIPLES = 10_000

# One space, or a new line with its indentation: small models, once they write white space, write nothing else any more.
_WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"
# Given as overrides: a schema's own "x-guidance" could loosen them.
_JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
_PATTERN_KEYS = frozenset({"pattern", "patternProperties"})


def grammar_text(spec: ConstraintSpec, *, schema_bytes: int = MAX_SCHEMA_BYTES) -> str:
    """Return the grammar for a spec. Raises ValueError with the reason when it is too large or no such source."""
    source = spec.source if isinstance(spec.source, str) else "".join(spec.source)
    _bound(source, schema_bytes if spec.kind is ConstraintKind.JSON_SCHEMA else _MOST_BYTES[spec.kind])
    return _TRANSLATIONS[spec.kind](spec.source)


def _bound(source: str, limit: int) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise ValueError("it is not Unicode") from None
    if size > limit:
        raise ValueError(f"it is larger than {limit} bytes")


def _json_object(source: Any) -> str:
    del source
    return _from_schema('{"type": "object"}')


def _json_schema(source: Any) -> str:
    try:
        schema = json.loads(source)
    except RecursionError:
        raise ValueError(f"it nests deeper than {MAX_NESTING} levels") from None
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")
    _check_schema(schema)
    return _from_schema(source)


def _from_schema(source: str) -> str:
    return LLMatcher.grammar_from_json_schema(source, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


def _check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError where a bound is exceeded. Goes level by level, since the nesting is not known yet."""
    level: list[Any] = [schema]
    depth = pattern_bytes = 0
    targets: set[str] = set()
    multiples: set[int] = set()
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError(f"it nests deeper than {MAX_NESTING} levels")
        for value in filter(_is_object, level):
            targets |= {ref for ref in [value.get("$ref")] if isinstance(ref, str)}
            multiples |= {_digits(value["multipleOf"])} if "multipleOf" in value else set()
            pattern_bytes += sum(len(json.dumps(value[key])) for key in _PATTERN_KEYS & value.keys())
        level = [part for value in level for part in _parts(value)]
    if pattern_bytes > MAX_REGEX_BYTES:
        raise ValueError(f"its patterns are larger than {MAX_REGEX_BYTES} bytes")
    if sum(multiples) > MAX_MULTIPLES:
        raise ValueError(f"multipleOf is supported up to {MAX_MULTIPLES}, all of them together")
    if depth * (len(targets) + 1) > MAX_LEVELS:
        raise ValueError(f"its references nest too deeply: {len(targets)} targets, {depth} levels")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    """Return the arrays and objects in a value. Raises ValueError when it holds a string that is too long."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if any(isinstance(part, str) and len(part) > MAX_STRING_BYTES for part in parts):
        raise ValueError(f"it holds a string longer than {MAX_STRING_BYTES} characters")
    return [part for part in parts if isinstance(part, dict | list)]


def _digits(number: Any) -> int:
    """Return the digits of a number as an integer, without the zeros at its end: 0.25 gives 25."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 0
    return int("".join(map(str, Decimal(str(number)).normalize().as_tuple().digits)))


def _regex(source: Any) -> str:
    backslashes = len(source) - len(source.rstrip("\\"))
    if backslashes % 2:  # it would escape the end that llguidance writes behind it
        raise ValueError("it ends in a backslash")
    return LLMatcher.grammar_from_regex(source)


def _choice(source: Any) -> str:
    if any(len(text) > MAX_STRING_BYTES for text in source):
        raise ValueError(f"it holds a string longer than {MAX_STRING_BYTES} characters")
    # One regular expression, not one alternative of a rule per choice: the lexer takes thousands, the parser does not.
    return LLMatcher.grammar_from_regex("|".join(map(re.escape, source)))


def _grammar(source: Any) -> str:
    # Takes EBNF as llama.cpp and xgrammar write it, and Lark; its own parser raises ValueError for both.
    return grammar_from("grammar", source)


_MOST_BYTES = {
    ConstraintKind.JSON_OBJECT: 0,
    ConstraintKind.REGEX: MAX_REGEX_BYTES,
    ConstraintKind.CHOICE: MAX_CHOICE_BYTES,
    ConstraintKind.GRAMMAR: MAX_GRAMMAR_BYTES,
}

_TRANSLATIONS: dict[ConstraintKind, Callable[[Any], str]] = {
    ConstraintKind.JSON_OBJECT: _json_object,
    ConstraintKind.JSON_SCHEMA: _json_schema,
    ConstraintKind.REGEX: _regex,
    ConstraintKind.CHOICE: _choice,
    ConstraintKind.GRAMMAR: _grammar,
}
