"""How routes describe themselves: request bodies from the tables that check them, answers by type, errors by status.

Owns what the keywords of a route say; `openapi` makes the document of all routes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ovms_lora.server.fields import Schema, Table

Responses = dict[int | str, dict[str, Any]]

REF = "#/components/schemas/{model}"

_MEANINGS = {
    400: "A field is wrong, or the URL",
    401: "No key, or a wrong one; only where keys are set",
    403: "The key does not open this, or the folder is not one that adapters may come from",
    404: "No such model or adapter",
    408: "The body took too long to come",
    412: "The body is not JSON with a model, or config.json is not usable",
    413: "The body is too large",
    415: "The body is not JSON by its Content-Type",
    422: "The adapter is bad in itself",
    429: "Too many requests wait; Retry-After says when to come again",
    431: "The headers are too large",
    500: "A step failed",
    503: "The model loads, or the server drains; Retry-After says when to come again",
    504: "The request took too long",
}
_ALWAYS = (401, 431, 500)
_WITH_BODY = (*_ALWAYS, 408, 413)


def body(table: Table, head: Schema | None = None) -> dict[str, Any]:
    """Return the request body that a table takes, for `openapi_extra`; `head` is what is checked before the table."""
    schema = table.schema
    if head:
        schema["properties"] = {**head["properties"], **schema["properties"], **head["properties"]}
        schema["required"] = [*head.get("required", []), *schema.get("required", [])]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def responses(error: Any, answer: Any = None, *, also: Iterable[int] = (), takes_body: bool = False) -> Responses:
    """Return the answers of a route: `answer` with 200, and `error` with the statuses that may come."""
    statuses = sorted({*(_WITH_BODY if takes_body else _ALWAYS), *also})
    # By name: with `model` FastAPI would describe errors in the media type of the answer.
    content = {"application/json": {"schema": {"$ref": REF.format(model=error.__name__)}}}
    failures: Responses = {status: {"description": _MEANINGS[status], "content": content} for status in statuses}
    return failures if answer is None else {200: {"model": answer, "description": "OK"}, **failures}


def streamed(answers: Responses, chunk: Any) -> Responses:
    """Return the answers of a route that also answers with events, each of them a `chunk`."""
    name = chunk.__name__
    told = f"With `stream`: server-sent events `data: <{name}>`, at the end `data: [DONE]`; or an error as last event."
    events = {"schema": {"type": "string", "description": told}, "x-event": {"$ref": REF.format(model=name)}}
    return {**answers, 200: {**answers[200], "content": {"text/event-stream": events}}}
