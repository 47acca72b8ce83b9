"""The program that compiles and renders chat templates: a process of its own, without rights and with little to spend.

A template is a program that came with a model or an adapter. In the sandbox it sees immutable data and reaches no
Python attribute; but a sandbox bounds neither time nor memory, and one expression such as `'x' * 10**10` is a single
step of the interpreter. So the kernel bounds them: processor time for each template, memory for the process.
`template_process` starts it, and starts another when it was killed. Imports nothing but Jinja.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 0.5
READY = b"ready"

_MEMORY_BYTES = 512 << 20
_MAX_OUTPUT_CHARS = 8 << 20
_COMPILED = 32
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class _Broken(Exception):
    """The source is not a template."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which transformers finds what the assistant has said."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body: here it only groups."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Render `source` with `values`, or only compile it without; return `text`, or what is `broken` or `refused`."""
    try:
        template = _compiled(request["source"])
        return {"text": _rendered(template, request["values"]) if "values" in request else ""}
    except _Broken as error:
        return {"broken": str(error)}
    except _REFUSALS as error:
        return {"refused": str(error)}


@lru_cache(_COMPILED)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except (SyntaxError, *_REFUSALS) as error:
        raise _Broken(str(error)) from error


def _rendered(template: jinja2.Template, values: dict[str, Any]) -> str:
    size, parts = 0, []
    for part in template.generate(values):
        size += len(part)
        if size > _MAX_OUTPUT_CHARS:
            raise jinja2.TemplateError("its output is too long")
        parts.append(part)
    return "".join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; templates of language models expect plain JSON, and transformers' parameters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def serve(connection: Connection) -> None:
    """Answer requests until the other side is gone."""
    connection.send_bytes(READY)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # What the timer sends ends the process, wherever in the template it is.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answered = json.dumps(answer(request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answered)


def main() -> None:
    """Give up what a template has no use for, then serve on the descriptor of the command line."""
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(limit, (value, value))
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
