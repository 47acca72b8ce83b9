"""`/openapi.json`, and `/docs`: the same document as a page.

The page is plain HTML without scripts: it loads nothing, from nowhere, and shows what the document says. Owns how it is
written; what it says stands in `openapi`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse

from ovms_lora.server.state import state_of

_SECURITY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"}
_BOUNDS = (
    *(("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"), ("exclusiveMaximum", "< {}")),
    *(("minLength", "at least {} characters"), ("maxLength", "at most {} characters")),
    *(("minItems", "at least {} items"), ("maxItems", "at most {} items"), ("maxProperties", "at most {} entries")),
)

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """Return the OpenAPI document."""
    return JSONResponse(await state_of(request).workers.block(request.app.openapi))


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Return the OpenAPI document as a page."""
    return HTMLResponse(await state_of(request).workers.block(_page, request.app), headers=_SECURITY)


def _page(app: Any) -> str:
    import jinja2  # here, since every start would wait for it, and few ask for this page

    template = jinja2.Template(_template(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text: str = template.render(document=app.openapi(), told=told, body_of=_body_of, members_of=_members_of)
    return text


def _template() -> str:
    return Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def _body_of(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an operation's body; empty where it takes none."""
    content = operation.get("requestBody", {}).get("content", {})
    schema: dict[str, Any] = content.get("application/json", {}).get("schema", {})
    return schema


def _members_of(schema: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """Return the members of an object, required ones first: name, whether it is required, what it takes."""
    required = schema.get("required", ())
    members = [(name, name in required, told(member)) for name, member in schema.get("properties", {}).items()]
    return sorted(members, key=lambda member: not member[1])


def told(schema: dict[str, Any]) -> str:
    """Return a schema in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(told, schema["anyOf"])))
    if schema.get("not") == {}:
        return "not supported"
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    kind = schema.get("type", "anything")
    words = [" or ".join(kind) if isinstance(kind, list) else kind, *_bounds(schema)]
    if kind == "array" and schema.get("items"):
        words[0] = f"array of ({told(schema['items'])})"
    if members := schema.get("properties"):
        words.append("{" + "; ".join(f"{name}: {told(member)}" for name, member in members.items()) + "}")
    if isinstance(values := schema.get("additionalProperties"), dict):
        words.append(f"of ({told(values)})")
    return " ".join(words)


def _bounds(schema: dict[str, Any]) -> list[str]:
    told_bounds = [words.format(_plain(schema[name])) for name, words in _BOUNDS if name in schema]
    return [", ".join(told_bounds)] if told_bounds else []


def _plain(bound: float) -> float:
    return int(bound) if float(bound).is_integer() else bound
