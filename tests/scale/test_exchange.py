"""A request through an exchange: messages as they are sent, and an application that hears when its client has gone."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import aclosing

import pytest
from starlette.types import Message, Receive, Scope, Send

from ovms_lora.scale.exchange import Exchange, Forwarded, Relay, received_body
from ovms_lora.server.disconnect import ClientGoneError

pytestmark = pytest.mark.anyio
SCOPE: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "query_string": b"a=1",
    "headers": [(b"host", b"here"), (b"x-request-id", b"the client's own")],
    "app": object(),
    "state": {"tenant": object()},
}


def forwarded(body: bytes = b"{}") -> Forwarded:
    return Forwarded.of(SCOPE, body, "id-1", 7)


async def test_a_request_travels_without_what_belongs_to_the_process() -> None:
    request = pickle.loads(pickle.dumps(forwarded()))  # noqa: S301 - our own
    scope = request.as_scope()
    assert scope["headers"] == [(b"host", b"here"), (b"x-request-id", b"id-1")]
    assert scope["query_string"] == b"a=1"
    assert "app" not in scope
    assert scope["state"] == {}
    assert request.version == 7


async def test_messages_come_as_soon_as_they_are_sent() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.01)  # the start alone is not passed on
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"2"})

    batches: list[list[Message]] = []
    async with aclosing(Exchange(app, forwarded()).messages()) as messages:
        async for batch in messages:
            batches.append(batch)
            go_on.set()
    assert [[message.get("body") for message in batch] for batch in batches] == [[None, b"1"], [b"2"]]


async def test_an_application_hears_that_its_client_has_gone() -> None:
    heard = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        heard.set()

    async with aclosing(Exchange(app, forwarded()).messages()) as messages:
        await anext(messages)
    await asyncio.wait_for(heard.wait(), 5)


async def test_an_application_that_breaks_off_ends_the_messages() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    assert len([batch async for batch in Exchange(app, forwarded()).messages()]) == 1


async def test_a_body_comes_in_parts() -> None:
    parts: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b"},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return parts.pop(0)

    assert await received_body(receive) == b"ab"
    with pytest.raises(ClientGoneError):
        await received_body(receive)


@pytest.mark.parametrize(("kind", "is_stream"), [(b"text/event-stream; charset=utf-8", True), (b"text/plain", False)])
async def test_a_relay_knows_how_far_an_answer_has_come(kind: bytes, is_stream: bool) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    relay = Relay(send)
    assert not relay.started
    await relay({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", kind)]})
    assert (relay.started, relay.ended, relay.is_event_stream) == (True, False, is_stream)
    await relay({"type": "http.response.body", "body": b"", "more_body": False})
    assert relay.ended
    assert len(sent) == 2
