"""A fleet refuses as one server does, in both dialects: status, body and headers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from ovms_lora.engine.model import load_model
from ovms_lora.server.app import build_app
from tests.scale.fleet import ADMIN, BASE, KEY, MAX_SEQUENCES, SQL, WAITING, Fleet, request

OURS = {"Authorization": f"Bearer {KEY}"}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "v1 no JSON": ("POST", "/v1/completions", {"content": b"{"}),
    "v3 no JSON": ("POST", "/v3/completions", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    "v1 unknown model": ("POST", "/v1/chat/completions", {"json": {"model": "nobody", "messages": []}}),
    "v3 unknown model": ("POST", "/v3/completions", {"json": {"model": "nobody", "prompt": "a"}}),
    "v1 bad field": ("POST", "/v1/completions", {"json": request(SQL, temperature=-1)}),
    "v3 bad field": ("POST", "/v3/completions", {"json": request(SQL, temperature=-1)}),
    "v1 bad field of a stream": ("POST", "/v1/completions", {"json": request(SQL, n=0, stream=True)}),
    "v1 blend of a stranger": ("POST", "/v1/completions", {"json": request(lora=[{"alias": "nobody"}])}),
    "v3 too long": ("POST", "/v3/completions", {"json": request(prompt="a" * 5000)}),
    "v3 no such endpoint": ("POST", "/v3/nowhere", {"json": {}}),
    "no such URL": ("GET", "/nowhere", {}),
    "no such method": ("DELETE", "/v1/models", {}),
    "v1 no such card": ("GET", "/v1/models/nobody", {}),
    "v3 no such card": ("GET", "/v3/models/nobody", {}),
    "no such model to describe": ("GET", "/v2/models/nobody", {}),
    "v1 no key": ("POST", "/v1/completions", {"json": request(), "headers": {"Authorization": ""}}),
    "v3 no key": ("POST", "/v3/completions", {"json": request(), "headers": {"Authorization": ""}}),
    "no key for admins": ("POST", "/v1/load_lora_adapter", {"json": {}}),
    "nothing to load": (
        "POST",
        "/v1/load_lora_adapter",
        {"json": {"lora_name": "x"}, "headers": {"Authorization": f"Bearer {ADMIN}"}},
    ),
    "v1 too large": ("POST", "/v1/completions", {"content": b" " * 3_000_000}),
    "v3 too large": ("POST", "/v3/completions", {"content": b" " * 3_000_000}),
    "v1 tokens": ("POST", "/v1/tokenize", {"json": {"model": SQL, "prompt": "Once"}}),
    "v3 tokens": ("POST", "/v3/tokenize", {"json": {"model": BASE, "text": "Once"}}),
    "more than gRPC takes by itself": ("POST", "/v1/tokenize", {"json": {"model": BASE, "prompt": "abcd" * 400_000}}),
    "live": ("GET", "/v2/health/live", {}),
    "ready": ("GET", "/v2/health/ready", {}),
    "states": ("GET", "/v1/config", {}),
    "metadata": ("GET", "/v2/models/sql", {}),
    "openapi": ("GET", "/openapi.json", {}),
}


@pytest.fixture(scope="module")
def alone(fleet: Fleet) -> Iterator[TestClient]:
    """One server with the same models."""
    app = build_app(fleet.config.options, fleet.config.source, load_model)
    with TestClient(app, raise_server_exceptions=False) as client:
        while not app.state.server.lifecycle.started:
            time.sleep(0.05)
        yield client


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_server(fleet: Fleet, alone: TestClient, case: str) -> None:
    method, path, given = CASES[case]
    headers = {**OURS, **given.get("headers", {})}
    expected = alone.request(method, path, **{**given, "headers": headers})
    with httpx.Client(base_url=fleet.url, timeout=60) as client:
        got = client.request(method, path, **{**given, "headers": headers})
    assert (got.status_code, got.text) == (expected.status_code, expected.text)
    names = ("content-type", "www-authenticate", "retry-after", "allow")
    assert [got.headers.get(name) for name in names] == [expected.headers.get(name) for name in names]
    assert len(got.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v3/completions"])
def test_what_is_too_much_is_refused_with_a_time_to_come_again(fleet: Fleet, path: str) -> None:
    asked = 2 * (2 * MAX_SEQUENCES + 2 * WAITING)
    limits = httpx.Limits(max_connections=asked)
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(base_url=fleet.url, headers=headers, limits=limits, timeout=60) as client,
        ThreadPoolExecutor(asked) as pool,
    ):
        answers = list(pool.map(lambda _: client.post(path, json=request(max_tokens=200)), range(asked)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["retry-after"] for answer in refused)
    errors = [answer.json()["error"] for answer in refused]
    assert all(
        error["type"] == "RateLimitError" if path.startswith("/v1") else isinstance(error, str) for error in errors
    )
