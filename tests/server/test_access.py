"""Who gets in, how much they may send, and what unknown addresses answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ovms_lora.server.health import PROBES
from ovms_lora.server.keys import plain_keys
from ovms_lora.server.options import Limits, ServerOptions
from tests.server.serving import Served, serving

pytestmark = pytest.mark.anyio

KEY = {"Authorization": "Bearer secret"}
BODY = {"model": "m", "prompt": "hi", "max_tokens": 1}


def with_keys(*keys: str) -> ServerOptions:
    return ServerOptions(poll_seconds=0, api_keys=plain_keys(*keys))


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 400, "Invalid request URL"),
        ("POST", "/nope", 400, "Invalid request URL"),
        ("GET", "/v3/nope", 400, "Invalid request URL"),
        ("GET", "/v3/completions/", 400, "Invalid request URL"),
        ("GET", "/v3/completions", 406, "Unsupported method"),
        ("PUT", "/v3/completions", 406, "Unsupported method"),
        ("DELETE", "/v3/models", 406, "Unsupported method"),
        ("POST", "/v2", 406, "Unsupported method"),
        ("POST", "/v1/config", 406, "Unsupported method"),
        ("GET", "/v1/config/reload", 406, "Unsupported method"),
    ],
)
async def test_ovms_addresses(served: Served, method: str, path: str, status: int, message: str) -> None:
    response = await served.client.request(method, path)
    assert (response.status_code, response.json()) == (status, {"error": message})


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nope", 404, "NotFoundError"),
        ("POST", "/v1/nope", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("POST", "/v1/models", 405, "MethodNotAllowedError"),
    ],
)
async def test_openai_addresses(served: Served, method: str, path: str, status: int, kind: str) -> None:
    response = await served.client.request(method, path)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)


async def test_a_wrong_v3_endpoint_names_the_right_ones(served: Served) -> None:
    response = await served.post("/v3/embeddings", model="m")
    assert response.status_code == 400
    assert response.json()["error"].endswith(
        "failed: Wrong endpoint. Allowed endpoints: /v3/chat/completions, /v3/completions, /v3/tokenize"
    )
    assert (await served.post("/v3/embeddings")).status_code == 412
    assert (await served.post("/v3/embeddings", model="x")).status_code == 404


async def test_every_route_but_the_probes_wants_a_key() -> None:
    async with serving(options=with_keys("secret")) as served:
        paths = [str(path) for path in served.app.openapi()["paths"]] + ["/", "/nope", "/docs", "/openapi.json"]
        assert "/v3/completions" in paths
        for path in paths:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                response = await served.client.request(method, path)
                assert (response.status_code == 401) == (path not in PROBES), (method, path)
        assert (await served.client.post("/v3/completions", json=BODY, headers=KEY)).is_success


@pytest.mark.parametrize(
    "header", ["", "secret", "Basic secret", "Bearer", "Bearer Secret", "Bearer secret2", "Bearer secret secret"]
)
async def test_wrong_keys_are_refused(header: str) -> None:
    async with serving(options=with_keys("secret")) as served:
        v3 = await served.client.post("/v3/completions", json=BODY, headers={"Authorization": header})
        assert (v3.status_code, v3.json()) == (401, {"error": "Unauthorized"})
        assert v3.headers["www-authenticate"] == "Bearer"
        v1 = await served.client.post("/v1/completions", json=BODY, headers={"Authorization": header})
        assert v1.json()["error"]["type"] == "AuthenticationError"


async def test_each_of_several_keys_opens() -> None:
    async with serving(options=with_keys("one", "two")) as served:
        for key in ("one", "two"):
            response = await served.client.get("/v3/models", headers={"Authorization": f"bearer {key}"})
            assert response.is_success


async def test_the_host_does_not_choose_the_path() -> None:
    async with serving(options=with_keys("secret")) as served:
        for host in ("x/health?", "x/v2/health/live#"):
            response = await served.client.get("/v3/models", headers={"Host": host})
            assert response.status_code == 401


@pytest.mark.parametrize("size", [1999, 2000, 2001])
async def test_bodies_end_at_the_limit(size: int) -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(body_bytes=2000))
    async with serving(options=options) as served:
        body = json.dumps(BODY).encode().ljust(size)
        expected = 413 if size > 2000 else 200
        assert (await served.client.post("/v3/completions", content=body)).status_code == expected

        async def pieces() -> AsyncIterator[bytes]:
            for begin in range(0, size, 100):
                yield body[begin : begin + 100]

        for path in ("/v3/completions", "/v1/completions"):
            assert (await served.client.post(path, content=pieces())).status_code == expected


async def test_too_large_is_said_in_both_dialects() -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(body_bytes=10))
    async with serving(options=options) as served:
        v3 = await served.client.post("/v3/completions", content=b" " * 11)
        assert v3.json() == {"error": "the body is larger than 10 bytes"}
        v1 = await served.client.post("/v1/completions", content=b" " * 11)
        assert v1.json()["error"]["type"] == "RequestTooLargeError"


async def test_a_body_that_does_not_come_answers_408() -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(10)

    options = ServerOptions(poll_seconds=0, limits=Limits(receive_seconds=0.05))
    async with serving(options=options) as served:
        response = await served.client.post("/v3/completions", content=stalls())
        assert response.status_code == 408


async def test_origins_are_closed_unless_named() -> None:
    origin = {"Origin": "http://here", "Access-Control-Request-Method": "POST"}
    async with serving() as served:
        assert "access-control-allow-origin" not in (await served.client.get("/v2", headers=origin)).headers
    options = ServerOptions(poll_seconds=0, allowed_origins=("http://here",), api_keys=plain_keys("secret"))
    async with serving(options=options) as served:
        preflight = await served.client.options("/v3/completions", headers=origin)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "http://here")
        assert (await served.client.post("/v3/completions", headers=origin, json=BODY)).status_code == 401


async def test_the_log_has_ids_and_no_prompts(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="ovms_lora")
    body: dict[str, Any] = BODY | {"prompt": "my secret prompt", "odd\nfield": 1}
    response = await served.client.post("/v3/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert response.headers["x-request-id"] == "abc-1"
    assert "POST /v3/completions 200" in caplog.text
    assert "my secret prompt" not in caplog.text
    assert "'odd\\nfield'" in caplog.text
    other = await served.client.get("/v2", headers={"X-Request-Id": "no\tgood"})
    assert len(other.headers["x-request-id"]) == 16


async def test_a_path_cannot_write_log_lines(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ovms_lora")
    await served.client.get("/v3/%0aERROR%20forged%1b[2J")
    line = next(record for record in caplog.messages if "forged" in record)
    assert "\n" not in line
    assert "\x1b" not in line


async def test_probes(served: Served) -> None:
    for path in PROBES:
        assert (await served.client.get(path)).status_code == 200
    served.state.lifecycle.draining = True
    assert (await served.client.get("/v2/health/ready")).status_code == 503
    assert (await served.client.get("/v2/health/live")).status_code == 200
    refused = await served.post("/v3/completions", **BODY)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers


async def test_a_stuck_engine_is_not_live() -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(heartbeat_seconds=0.05))
    async with serving(options=options) as served:
        gate = served.models.runners["m"].gate
        gate.clear()
        running = asyncio.create_task(served.post("/v3/completions", **BODY))
        await asyncio.sleep(0.2)
        assert (await served.client.get("/v2/health/live")).status_code == 503
        assert (await served.client.get("/v2/health/ready")).status_code == 503
        gate.set()
        assert (await running).is_success


async def test_metrics_count_by_model(served: Served) -> None:
    await served.post("/v3/completions", **BODY)
    await served.post("/v3/completions", **BODY | {"prompt": ""})
    await served.post("/v3/completions", **BODY | {"model": "unknown"})
    await served.text("/v1/completions", **BODY, stream=True)
    lines = (await served.client.get("/metrics")).text.splitlines()
    labels = 'api="V3",interface="REST",method="Unary",name="m"'
    for line in (
        f"ovms_requests_accepted{{{labels}}} 2.0",
        f"ovms_responses{{{labels}}} 1.0",
        f"ovms_graph_error{{{labels}}} 1.0",
        'ovms_responses{api="V1",interface="REST",method="Stream",name="m"} 1.0',
        'ovms_current_graphs{name="m"} 0.0',
        'ovms_graph_processing_time_us_count{method="Unary",name="m"} 1.0',
        'vllm:num_requests_running{model_name="m"} 0.0',
        'vllm:time_to_first_token_seconds_count{model_name="m"} 2.0',
        'vllm:e2e_request_latency_seconds_count{model_name="m"} 2.0',
    ):
        assert line in lines
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    assert {
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
    } <= names
    assert "unknown" not in "\n".join(line for line in lines if not line.startswith("#"))


async def test_metrics_can_be_off() -> None:
    async with serving(options=ServerOptions(poll_seconds=0, metrics=False)) as served:
        assert (await served.client.get("/metrics")).status_code == 400


async def test_the_description_names_every_route(served: Served) -> None:
    paths = (await served.client.get("/openapi.json")).json()["paths"]
    assert {"/v3/completions", "/v1/chat/completions", "/v1/config/reload", "/metrics"} <= set(paths)


async def test_probes_are_logged_for_debugging_only(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="ovms_lora")
    for path in (*PROBES, "/v1/models"):
        await served.client.get(path)
    levels = {record.getMessage().split()[1]: record.levelno for record in caplog.records if "access" in record.name}
    assert levels == dict.fromkeys(PROBES, logging.DEBUG) | {"/v1/models": logging.INFO}
