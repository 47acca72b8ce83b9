"""Requests for text are refused by their head while there is no room, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.server.keys import ApiKey, digest_of
from ovms_lora.server.options import Limits, ServerOptions
from ovms_lora.server.tenants import Tenant
from tests.server.raw import HEAD, Listening, RawClient, listening, status
from tests.server.serving import FakeModels, write_config

pytestmark = pytest.mark.anyio

BODY = b'{"model": "m", "prompt": "hi", "max_tokens": 1}'
LIMITS = Limits(waiting_requests=2)


def models() -> FakeModels:
    return FakeModels(options=EngineOptions(max_num_seqs=1, max_num_batched_tokens=64))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def full(server: Listening, key: str = "") -> AsyncIterator[None]:
    """Fill the queue of the first model; at the end all that waits is answered."""
    gate, engine = server.served.models.runners["m"].gate, server.served.models.engines[0]
    gate.clear()
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def ask() -> int:
        return (await server.served.client.post("/v1/completions", content=BODY, headers=headers)).status_code

    running = asyncio.create_task(ask())
    await until(lambda: engine.stats().running == 1)
    waiting = [asyncio.create_task(ask()) for _ in range(2)]
    await until(lambda: engine.stats().waiting == 2)
    try:
        yield
    finally:
        gate.set()
        assert [await task for task in (running, *waiting)] == [200] * 3


def sized(path: bytes = b"/v3/completions", more: bytes = b"") -> bytes:
    return HEAD.replace(b"/v3/completions", path) + more + b"Content-Length: %d\r\n\r\n" % len(BODY)


async def answer_and_body(client: RawClient) -> str:
    head = await client.answer()
    length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
    return head + (await client.reader.readexactly(length)).decode()


@pytest.mark.parametrize("path", [b"/v3/completions", b"/v1/chat/completions"])
async def test_a_full_queue_refuses_before_the_body_has_come(path: bytes) -> None:
    async with listening(models(), limits=LIMITS) as server, server.client() as client:
        async with full(server):
            for _ in range(2):  # the connection can be used again
                await client.send(sized(path))
                answer = await answer_and_body(client)
                assert (status(answer), "retry-after: 1" in answer.lower()) == (429, True)
                assert "2 requests are waiting already" in answer
                await client.send(BODY)
        await client.send(sized() + BODY)
        assert status(await answer_and_body(client)) == 200
        metrics = (await server.served.client.get("/metrics")).text
        api = "V1" if b"v1" in path else "V3"
        assert f'ovms_requests_rejected{{api="{api}",interface="REST",method="Unary",name="m"}} 2.0' in metrics


async def test_a_body_of_its_refused_request_is_no_request() -> None:
    async with listening(models(), limits=LIMITS) as server, server.client() as client, full(server):
        smuggled = b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n"
        await client.send(HEAD + b"Content-Length: %d\r\n\r\n" % len(smuggled) + smuggled)
        assert status(await answer_and_body(client)) == 429
        await client.send(sized() + BODY)
        assert status(await answer_and_body(client)) == 429


async def test_all_else_is_answered_while_the_queue_is_full() -> None:
    async with listening(models(), limits=LIMITS) as server, full(server):
        for method, path, expected in (
            ("GET", "/v3/models", 200),
            ("GET", "/v2/health/ready", 200),
            ("POST", "/v3/tokenize", 200),
            ("GET", "/v3/completions", 406),
        ):
            response = await server.served.client.request(method, path, json={"model": "m", "text": "hi"})
            assert response.status_code == expected


async def test_a_full_model_leaves_others_free(tmp_path: Path) -> None:
    source = write_config(tmp_path, "m", "other")
    async with listening(models(), limits=LIMITS, source=source) as server, full(server):
        for model, expected in (("m", 429), ("other", 200)):
            response = await server.served.post("/v1/completions", model=model, prompt="hi", max_tokens=1)
            assert response.status_code == expected


async def test_a_tenant_is_refused_for_its_own_share() -> None:
    keys = tuple(ApiKey(digest_of(name), Tenant(name, None, 0.5)) for name in ("flood", "calm"))
    options = ServerOptions(poll_seconds=0, api_keys=keys, limits=Limits(waiting_requests=4))
    async with listening(models(), options=options) as server, full(server, "flood"), server.client() as client:
        await client.send(sized(more=b"Authorization: Bearer flood\r\n") + BODY)
        assert "2 requests of yours are waiting already" in await answer_and_body(client)
        await client.send(sized(more=b"Authorization: Bearer calm\r\n") + BODY)
        server.served.models.runners["m"].gate.set()
        assert status(await answer_and_body(client)) == 200
