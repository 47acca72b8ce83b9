"""No spelling of an address or a host gets around the keys: bytes on a real socket, to all routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ovms_lora.server.health import PROBES
from ovms_lora.server.keys import plain_keys
from ovms_lora.server.options import ServerOptions
from tests.server.raw import Listening, listening, status

pytestmark = pytest.mark.anyio

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get")


@pytest.fixture(scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Listening]:
    folders: tuple[Path, ...] = (tmp_path_factory.mktemp("adapters"),)
    options = ServerOptions(
        poll_seconds=0,
        api_keys=plain_keys("client"),
        admin_keys=plain_keys("admin"),
        runtime_lora_updating=True,
        lora_path_prefixes=folders,
    )
    async with listening(options=options) as server:
        yield server


async def ask(server: Listening, target: str, *, method: str = "GET", host: str = "t", headers: str = "") -> int:
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n"
    return status(await server.ask(head.encode("latin-1")))


async def test_all_routes_and_methods_want_a_key(closed: Listening) -> None:
    paths = [path.replace("{name}", "m").replace("{version}", "1") for path in closed.served.app.openapi()["paths"]]
    assert {"/v1/load_lora_adapter", "/v1/config/reload", "/v3/completions", "/metrics"} <= set(paths)
    for path in (*paths, "/", "/nope", "/docs", "/openapi.json", "/redoc", "/v3/anything", "*"):
        for method in METHODS:
            answered = await ask(closed, path, method=method)
            assert (answered == 401) == (path not in PROBES), (method, path, answered)


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/config/reload"])
async def test_what_changes_the_server_wants_an_admin_key(closed: Listening, path: str) -> None:
    for method in METHODS:
        assert await ask(closed, path, method=method, headers="Authorization: Bearer client\r\n") == 403
        answered = await ask(closed, path, method=method, headers="Authorization: Bearer admin\r\n")
        assert answered not in (401, 403)


@pytest.mark.parametrize(
    "target",
    [
        "//v3/models",
        "/v3//models",
        "/v3/models/",
        "/v3/models/.",
        "/v3/./models",
        "/v2/health/live/../../../v3/models",
        "/health/../v3/models",
        "/health/..%2fv3/models",
        "/v3%2fmodels",
        "/%76%33/models",
        "/v3/models%2e",
        "/v3/models.",
        "/V3/Models",
        "/v3/models;/health",
        "/v3/models?/health",
        "/v3/models#/health",
        "/v3/models%00/health",
        "/v3/models%23/health",
        "/v3/models%3f/health",
        "\\v3\\models",
        "http://t/v3/models",
        "http://t/health",
        "http://t/v2/health/live",
        "https://user@t/health",
        "//t/health",
        "/health/",
        "/health.",
        "/HEALTH",
        "/v2/health/live/",
        "/v2//health/live",
        "/v1%2fload_lora_adapter",
        "t/health",
        "?/health",
    ],
)
async def test_no_spelling_of_an_address_opens(closed: Listening, target: str) -> None:
    for method in ("GET", "POST"):
        assert await ask(closed, target, method=method) in (400, 401), (method, target)


async def test_another_spelling_of_an_admin_path_is_another_path(closed: Listening) -> None:
    for target in ("/v1/load_lora_adapter/", "/v1//load_lora_adapter", "/V1/load_lora_adapter", "/v1/config/reload/"):
        answered = await ask(closed, target, method="POST", headers="Authorization: Bearer client\r\n")
        assert answered in (400, 404), target
    # An escaped one is the path itself.
    answered = await ask(closed, "/v1/load%5flora_adapter", method="POST", headers="Authorization: Bearer client\r\n")
    assert answered == 403


@pytest.mark.parametrize(
    "host", ["t/health?", "health", "t/v2/health/live#", "/health", "t:80/health", "", "[::1]/ping"]
)
async def test_no_host_opens(closed: Listening, host: str) -> None:
    assert await ask(closed, "/v3/models", host=host) in (400, 401)


@pytest.mark.parametrize(
    "headers",
    [
        "X-Original-URL: /health\r\n",
        "X-Rewrite-URL: /health\r\n",
        "X-Forwarded-Prefix: /health\r\n",
        "X-HTTP-Method-Override: GET\r\n",
        "Authorization: Bearer\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Bearer client x\r\n",
        "Authorization: Basic client\r\n",
        "Authorization: Bearer wrong\r\nAuthorization: Bearer client\r\n",
        "Authorization: Bearer client, Bearer wrong\r\n",
        "Authorization: Bearer clien\xe9\r\n",
        "X-Api-Key: client\r\n",
        "Cookie: Authorization=client\r\n",
    ],
)
async def test_no_other_header_opens(closed: Listening, headers: str) -> None:
    assert await ask(closed, "/v3/models", headers=headers) == 401
    assert await ask(closed, "/v3/models", headers="authorization: bearer  client\r\n") == 200
