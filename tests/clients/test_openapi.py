"""The OpenAPI document against the server: every field of the tables, every kind of answer, and the page."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.server import config_routes, health, lora_routes, metrics_route, tokenize, v1, v1_fields, v3, v3_fields
from ovms_lora.server.fields import Field, ModelLimits, Table
from ovms_lora.server.health import PROBES
from ovms_lora.server.keys import plain_keys
from ovms_lora.server.options import ServerOptions
from tests.server.serving import Served, serving, write_adapters, write_lora_config
from tests.server.test_hostile_fields import JSON

pytestmark = pytest.mark.anyio

TABLES = {
    "/v3/completions": v3_fields.COMPLETIONS,
    "/v3/chat/completions": v3_fields.CHAT,
    "/v3/tokenize": tokenize.OVMS,
    "/v1/completions": v1_fields.COMPLETIONS,
    "/v1/chat/completions": v1_fields.CHAT,
    "/v1/tokenize": tokenize.VLLM,
    "/v1/load_lora_adapter": lora_routes._LOAD,
    "/v1/unload_lora_adapter": lora_routes._UNLOAD,
}
CALLS: tuple[Any, ...] = ("", [""], [{}], [{"function": {}}])
SCHEMAS: tuple[Any, ...] = (None, {}, {"schema": {}}, {"schema": 1})
# Values near those that fields take, beside any JSON.
LIKELY: st.SearchStrategy[Any] = st.sampled_from(
    (
        *(0, 1, -1, 20, 21, 2**32, 0.5, 2.5, "", "a", "auto", "left", "a" * 257, [], [""], ["a"], [0], [[1]], {}, True),
        *({"role": "user"}, [{"role": "user", "content": "a"}], [{"role": "user", "content": [{"type": "text"}]}]),
        *({"type": "text"}, {"a": 1}, {"1": 5}, {"1": 101}, [{"alias": "a"}], [{"alias": "a", "alpha": 1e9}], None),
        *({"include_usage": True}, {"include_usage": None}, [{"type": "function", "function": {"name": "f"}}]),
        *([{"function": {"name": "f", "parameters": []}}], [{"type": "other"}], [{"function": {"name": ""}}], "none"),
        *({"function": {"name": "f"}}, {"function": {"name": ""}}, {"function": {}}, {"function": 1}),
        *([{"role": "assistant", "tool_calls": calls}] for calls in CALLS),
        *({"type": "json_object"}, {"type": "json_schema"}, {"type": "yaml"}, {"type": True}),
        *({"type": "json_schema", "json_schema": schema} for schema in SCHEMAS),
        *({"regex": "a"}, {"regex": ""}, {"regex": "a", "json": None}, {"regex": "a", "choice": ["a"]}, {"json": {}}),
        *(
            {"choice": ["a"]},
            {"choice": []},
            {"choice": [1]},
            {"json_object": True},
            {"json_object": 1},
            {"json": "{}"},
        ),
        *({"regex": "a", name: value} for name in ("disable_fallback", "other") for value in (0, False, None)),
    )
)


@pytest.fixture(scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder / "found", "later")
    path = write_lora_config(folder, lora_options={"dynamic_lora_loading_path": "found"})
    options = ServerOptions(poll_seconds=0, runtime_lora_updating=True, lora_path_prefixes=(folder,))
    async with serving(source=path, options=options) as served:
        yield served


@pytest.mark.parametrize("path", TABLES)
@given(data=st.data(), value=LIKELY | JSON)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_what_a_schema_refuses_the_table_refuses(path: str, data: st.DataObject, value: Any) -> None:
    field: Field = data.draw(st.sampled_from(TABLES[path].fields))
    try:
        Table((field,), ()).read({field.name: value}, ModelLimits())
    except InvalidFieldError:
        return
    assert jsonschema_rs.is_valid(field.schema, value)


@pytest.mark.parametrize("path", TABLES)
async def test_the_document_has_the_fields_of_the_tables(adapted: Served, path: str) -> None:
    body = adapted.app.openapi()["paths"][path]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    checked_before = {"model", "stream"} - TABLES[path].names
    assert set(schema["properties"]) - checked_before == TABLES[path].names
    assert body["required"]


async def test_every_route_is_described(adapted: Served) -> None:
    document = (await adapted.client.get("/openapi.json")).json()
    routes = {
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for part in (health, config_routes, v3, v1, lora_routes, metrics_route)
        for route in part.router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    }
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert described == routes
    assert ("post", "/v1/load_lora_adapter") in described
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert "200" in operation["responses"], path


ASKED: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("GET", "/v1/config", None, 200),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/{name}", {"name": "sql"}, 200),
    ("GET", "/v1/models/{name}", {"name": "nope"}, 404),
    ("GET", "/v2", None, 200),
    ("GET", "/v2/models/{name}", {"name": "base"}, 200),
    ("GET", "/v2/models/{name}", {"name": "nope"}, 404),
    ("GET", "/v2/models/{name}/ready", {"name": "nope"}, 404),
    ("GET", "/v3/models", None, 200),
    ("GET", "/v3/models/{name}", {"name": "base"}, 200),
    ("GET", "/v3/models/{name}", {"name": "nope"}, 404),
    ("POST", "/v1/config/reload", {}, 200),
    ("POST", "/v1/load_lora_adapter", {}, 400),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}, 404),
    ("POST", "/v1/tokenize", {"model": "base", "prompt": "hi", "return_token_strs": True}, 200),
    ("POST", "/v1/tokenize", {"model": "base"}, 400),
    ("POST", "/v3/tokenize", {"model": "base", "text": "hi"}, 200),
    ("POST", "/v3/tokenize", {"model": "base", "text": ["hi", "you"]}, 200),
    ("POST", "/v3/tokenize", {"model": "base"}, 400),
    ("POST", "/v3/tokenize", {}, 412),
]
PROMPT: dict[str, Any] = {"model": "sql", "prompt": "hi", "max_tokens": 3}
CHAT: dict[str, Any] = {"model": "mix", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
PARAMETERS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS: dict[str, Any] = {
    **CHAT,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}],
    "tool_choice": "required",
    "max_tokens": 80,
}
for version in ("/v1", "/v3"):
    ASKED += [
        ("POST", f"{version}/chat/completions", TOOLS, 200),
        ("POST", f"{version}/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 200),
        ("POST", f"{version}/completions", {**PROMPT, "best_of": 3, "n": 2}, 200),
        ("POST", f"{version}/completions", PROMPT, 200),
        ("POST", f"{version}/completions", {**PROMPT, "logprobs": 2, "echo": True}, 200),
        ("POST", f"{version}/chat/completions", CHAT, 200),
        ("POST", f"{version}/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}, 200),
        ("POST", f"{version}/completions", {**PROMPT, "temperature": 9}, 400),
        ("POST", f"{version}/completions", {**PROMPT, "model": "nope"}, 404),
        ("POST", f"{version}/chat/completions", {**CHAT, "messages": []}, 400),
    ]
ASKED.append(("POST", "/v1/completions", {**PROMPT, "prompt_logprobs": 1, "n": 2}, 200))


@pytest.mark.parametrize(("method", "path", "given_fields", "status"), ASKED)
async def test_answers_are_as_described(
    adapted: Served, method: str, path: str, given_fields: dict[str, Any] | None, status: int
) -> None:
    fields = given_fields or {}
    url = path.replace("{name}", fields.get("name", ""))
    response = await adapted.client.request(method, url, json=fields if method == "POST" else None)
    assert response.status_code == status, response.text
    answer = adapted.app.openapi()["paths"][path][method.lower()]["responses"][str(status)]
    check(adapted, answer["content"]["application/json"]["schema"], response.json())


@pytest.mark.parametrize("version", ["/v1", "/v3"])
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/completions", {**PROMPT, "logprobs": 1}),
        ("/chat/completions", {**CHAT, "logprobs": True}),
        ("/chat/completions", TOOLS),
    ],
)
async def test_events_are_as_described(
    adapted: Served, version: str, options: dict[str, Any], endpoint: str, body: dict[str, Any]
) -> None:
    path = version + endpoint
    response = await adapted.post(path, **body, **options, stream=True)
    described = adapted.app.openapi()["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    *events, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    for event in events:
        check(adapted, described["x-event"], json.loads(event))


def check(served: Served, schema: dict[str, Any], answer: Any) -> None:
    jsonschema_rs.validate({**schema, "components": served.app.openapi()["components"]}, answer)


async def test_keys_are_described_where_they_are_set() -> None:
    for options, closed in (
        (ServerOptions(poll_seconds=0), set()),
        (ServerOptions(poll_seconds=0, api_keys=plain_keys("secret")), None),
        (
            ServerOptions(poll_seconds=0, admin_keys=plain_keys("admin"), runtime_lora_updating=True),
            {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/config/reload"},
        ),
    ):
        async with serving(options=options) as served:
            paths = served.app.openapi()["paths"]
            secured = {path for path, methods in paths.items() if all("security" in m for m in methods.values())}
            assert secured == (set(paths) - PROBES if closed is None else closed)


async def test_the_page_shows_every_route_and_loads_nothing(adapted: Served) -> None:
    response = await adapted.client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for path in adapted.app.openapi()["paths"]:
        assert f"<code>{path}</code>" in response.text
    for field in ("lora_alphas", "best_of", "prompt_logprobs"):
        assert f"<code>{field}</code>" in response.text
    assert not re.search(r"<script|<link|<img|src=|https?://|@import|url\(", response.text)


async def test_the_page_and_the_document_want_a_key_like_others() -> None:
    async with serving(options=ServerOptions(poll_seconds=0, api_keys=plain_keys("secret"))) as served:
        for path in ("/docs", "/openapi.json"):
            assert (await served.client.get(path)).status_code == 401
            assert (await served.client.get(path, headers={"Authorization": "Bearer secret"})).status_code == 200


def test_the_page_is_part_of_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"server/docs_page.html"' in pyproject
