"""What ingress and replica say to each other: a whole HTTP request one way, ASGI messages the other way as they come.

Owns the form of both and how an application is run for them. Knows neither Ray nor what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovms_lora.server.disconnect import ClientGoneError
from ovms_lora.server.health import PROBES

# Of an ASGI scope what a request says; the rest belongs to the process that received it.
_CARRIED = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path"),
    *("client", "server"),
)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One request on its way to a replica; `version` is the state of the ledger that its answer must not lag behind."""

    scope: dict[str, Any]
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    version: int = 0

    @classmethod
    def of(cls, scope: Scope, body: bytes, request_id: str, version: int = 0) -> Forwarded:
        """Return a received request, under the id that the ingress logs."""
        given = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        carried = {key: scope[key] for key in _CARRIED if key in scope}
        return cls(carried, (*given, (b"x-request-id", request_id.encode("ascii"))), body, version)

    @property
    def is_probe(self) -> bool:
        """Whether somebody asks for the state of things, and not for long."""
        return self.scope["path"] in PROBES

    def as_scope(self) -> Scope:
        """Return the request as an application gets it."""
        return {**self.scope, "headers": list(self.headers), "state": {}, "extensions": {}}


class Exchange:
    """An application at work on one forwarded request."""

    def __init__(self, app: ASGIApp, request: Forwarded) -> None:
        self._app = app
        self._request = request
        self._sent: asyncio.Queue[Message | None] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._body_given = False

    async def messages(self) -> AsyncGenerator[list[Message]]:
        """Run the application; yield what it sends as soon as it does, what has come together in one list.

        The start of an answer waits for what follows, as with other servers: alone it is nothing to read.
        Closing the generator is the client's leaving: the application sees `http.disconnect`, and ends its work.
        """
        running = asyncio.create_task(self._run())
        try:
            ended = False
            while not ended:
                batch = [await self._sent.get()]
                if batch[0] is not None and batch[0]["type"] == "http.response.start":
                    batch.append(await self._sent.get())
                while not self._sent.empty():
                    batch.append(self._sent.get_nowait())
                ended = batch[-1] is None
                if messages := [message for message in batch if message is not None]:
                    yield messages
        finally:
            self._gone.set()
            _RUNNING.add(running)
            running.add_done_callback(_RUNNING.discard)

    async def _run(self) -> None:
        try:
            await self._app(self._request.as_scope(), self._receive, self._send)
        finally:
            self._sent.put_nowait(None)

    async def _receive(self) -> Message:
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            message = {**message, "headers": [(bytes(name), bytes(value)) for name, value in message["headers"]]}
        self._sent.put_nowait(message)


# What ends by itself once its client has gone; the loop alone would not keep it.
_RUNNING: set[asyncio.Task[None]] = set()


async def received_body(receive: Receive) -> bytes:
    """Return the whole body of a request. Raises ClientGoneError when the client leaves before it has sent that."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def is_end(message: Message) -> bool:
    """Tell whether nothing of an answer follows."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class Relay:
    """`send` that remembers how far an answer has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.ended = False
        self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the answer."""
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self.is_event_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        else:
            self.ended = is_end(message)
        await self._send(message)
