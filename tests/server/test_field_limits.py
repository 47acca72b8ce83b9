"""Each bound on a field or on waiting, one below it, at it and one above."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ovms_lora.engine.grammar import MAX_SCHEMA_BYTES
from ovms_lora.server.options import Limits, ServerOptions
from tests.server.serving import FakeModels, Served, serving
from tests.server.test_faults import slow_runner

pytestmark = pytest.mark.anyio

BODY = {"model": "m", "prompt": "hi", "max_tokens": 1}


def schema_of_size(size: int) -> dict[str, Any]:
    empty = len(json.dumps({"type": "integer", "description": ""}))
    return {"type": "integer", "description": "x" * (size - empty)}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


FIELDS: list[tuple[str, str, int, Callable[[int], Any]]] = [
    ("/v1", "prompt", 256, lambda count: ["a"] * count),
    ("/v3", "prompt", 256, lambda count: ["a"] * count),
    ("/v1", "n", 128, lambda count: count),
    ("/v3", "best_of", 20 - 1, lambda count: count),
    ("/v1", "stop", 16, lambda count: ["x"] * count),
    ("/v3", "stop", 16, lambda count: ["x"] * count),
    ("/v1", "stop", 256, lambda length: "x" * length),
    ("/v3", "stop", 256, lambda length: ["x", "y" * length]),
    ("/v1", "lora", 64, lambda count: [{"alias": f"a{number}"} for number in range(count)]),
]


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize(("prefix", "field", "limit", "value"), FIELDS, ids=[f"{row[0]} {row[1]}" for row in FIELDS])
async def test_fields_end_at_their_limits(
    shared: Served, prefix: str, field: str, limit: int, value: Callable[[int], Any], more: int
) -> None:
    response = await shared.post(f"{prefix}/completions", **{**BODY, field: value(limit + more)})
    if field == "lora":  # a model without adapters refuses it in any size; the size is checked first
        assert ("no more than 64" in response.text) == (more > 0), response.text
        return
    assert response.status_code == (400 if more > 0 else 200), response.text


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_logit_bias_ends_at_300_entries(shared: Served, more: int) -> None:
    bias = {str(number): 0.5 for number in range(300 + more)}  # beyond the vocabulary of 257, which is told apart
    response = await shared.post("/v1/completions", **BODY, logit_bias=bias)
    assert ("logit_bias must have no more than 300 entries" in response.text) == (more > 0)


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_schemas_end_at_their_size(shared: Served, more: int) -> None:
    schema = schema_of_size(MAX_SCHEMA_BYTES + more)
    for path in ("/v1/completions", "/v3/completions"):
        response = await shared.post(path, **BODY, response_format=schema_format(schema))
        # Its one long string is refused too, but by another bound.
        assert (f"larger than {MAX_SCHEMA_BYTES} bytes" in response.text) == (more > 0), response.text[:300]


CHANGED = Limits(prompts=3, n=2, stop_strings=2, stop_characters=5, logit_bias=2, schema_bytes=200)


@pytest.fixture(scope="module")
async def changed() -> AsyncIterator[Served]:
    async with serving(options=ServerOptions(poll_seconds=0, limits=CHANGED)) as served:
        yield served


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize(
    ("path", "field", "limit", "value"),
    [
        ("/v1/completions", "prompt", 3, lambda count: ["a"] * count),
        ("/v3/completions", "prompt", 3, lambda count: ["a"] * count),
        ("/v3/tokenize", "text", 3, lambda count: ["a"] * count),
        ("/v1/completions", "n", 2, lambda count: count),
        ("/v1/completions", "best_of", 2, lambda count: count),
        ("/v1/completions", "stop", 2, lambda count: ["x"] * count),
        ("/v3/completions", "stop", 5, lambda length: ["x", "y" * length]),
        ("/v1/completions", "logit_bias", 2, lambda count: {str(token): 1 for token in range(count)}),
        ("/v1/completions", "structured_outputs", 200, lambda size: {"json": schema_of_size(size)}),
        ("/v3/completions", "response_format", 200, lambda size: schema_format(schema_of_size(size))),
    ],
)
async def test_limits_of_fields_can_be_changed(
    changed: Served, path: str, field: str, limit: int, value: Callable[[int], Any], more: int
) -> None:
    body = {**BODY, "prompt": "hi"} if "completions" in path else {"model": "m"}
    response = await changed.post(path, **{**body, field: value(limit + more)})
    assert response.status_code == (400 if more > 0 else 200), response.text
    assert more <= 0 or str(limit) in response.text


async def test_the_description_has_the_limits_of_the_server(changed: Served, shared: Served) -> None:
    for served, limits in ((changed, CHANGED), (shared, Limits())):
        paths = (await served.client.get("/openapi.json")).json()["paths"]
        body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = {name: schema["anyOf"][0] for name, schema in body["properties"].items() if "anyOf" in schema}
        assert fields["n"] == {"type": "integer", "minimum": 1, "maximum": limits.n}
        assert fields["logit_bias"]["maxProperties"] == limits.logit_bias
        assert "x-limit" not in json.dumps(paths)


def test_the_compiler_has_the_same_bound() -> None:
    assert Limits().schema_bytes == MAX_SCHEMA_BYTES


@pytest.mark.parametrize("more", [-1, 0, 1])
async def test_the_queue_ends_at_its_limit(more: int) -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(waiting_requests=4))
    async with serving(FakeModels(), options=options) as served:
        gate, engine = served.models.runners["m"].gate, served.models.engines[0]
        gate.clear()
        try:
            running = asyncio.create_task(served.post("/v1/completions", **BODY))
            async with asyncio.timeout(5):
                while not engine.stats().running:
                    await asyncio.sleep(0.005)
                tasks = [asyncio.create_task(served.post("/v1/completions", **BODY)) for _ in range(4 + more)]
                while engine.stats().waiting < min(4, 4 + more) or sum(task.done() for task in tasks) < more:
                    await asyncio.sleep(0.005)
        finally:
            gate.set()
        statuses = sorted([(await task).status_code for task in (running, *tasks)])
        assert statuses == [200] * (5 + min(more, 0)) + [429] * max(more, 0)


@pytest.mark.parametrize(("steps", "status"), [(3, 200), (50, 504)])
async def test_requests_end_at_their_deadline(steps: int, status: int) -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(request_seconds=0.4))
    async with serving(FakeModels(runner=lambda: slow_runner(0.02)), options=options) as served:
        response = await served.post("/v1/completions", **{**BODY, "max_tokens": steps}, ignore_eos=True)
        assert response.status_code == status
