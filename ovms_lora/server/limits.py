"""Bounds on what is received: the size of headers and body, declared or not, and the time that a body may take.

Owns the bounds of the transport; bounds on fields stand with the fields.
"""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovms_lora.server.errors import error_style
from ovms_lora.server.options import Limits

# Of a body that is refused, so much is taken and thrown away: to close a connection on which a client still writes
# would lose it the answer.
_DISCARDED_BYTES = 16 * 1024 * 1024
_DISCARDING_SECONDS = 2.0
_SILENCE_SECONDS = 0.2


class LimitsMiddleware:
    """Refuses headers (431) and bodies (413) that are too large, and bodies that come too slowly (408)."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body bounded, or refuse it by its head."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            if refusal.status_code == 413 and "expect" not in Headers(scope=scope):
                await _discard(receive)
            await error_style(scope["path"]).http(refusal)(scope, receive, send)
            return
        await self._app(scope, _BoundedBody(receive, self._limits, self._too_large()), send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        """Return what refuses a request by its head alone."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.header_bytes:
            return HTTPException(431, f"the headers are larger than {self._limits.header_bytes} bytes")
        if len(scope["path"]) + len(scope["query_string"]) > self._limits.header_bytes:
            return HTTPException(414, f"the address is longer than {self._limits.header_bytes} bytes")
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            # Two servers may read two different requests from this one.
            return HTTPException(400, "the body has two lengths", {"Connection": "close"})
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> HTTPException:
        # Whoever sends more than is taken would go on sending: the connection ends with the answer.
        return HTTPException(413, f"the body is larger than {self._limits.body_bytes} bytes", {"Connection": "close"})


class _BoundedBody:
    """`receive` with the bounds; free of them once the body is complete."""

    def __init__(self, receive: Receive, limits: Limits, too_large: HTTPException) -> None:
        self._receive = receive
        self._too_large = too_large
        self._seconds = limits.receive_seconds
        self._room = limits.body_bytes
        self._deadline: float | None = None
        self._complete = False

    async def __call__(self) -> Message:
        """Return the next message. Raises HTTPException 413 or 408."""
        if self._complete:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body took too long to come", {"Connection": "close"}) from None
        self._room -= len(message.get("body", b""))
        if self._room < 0:
            if message.get("more_body", False):
                await _discard(self._receive)
            raise self._too_large
        self._complete = not message.get("more_body", False)
        return message


async def _discard(receive: Receive) -> None:
    """Throw away what a client still sends, within bounds; until it has nothing more on its way."""
    room, more = _DISCARDED_BYTES, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING_SECONDS):
            while more and room > 0:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await receive()
                room -= len(message.get("body", b""))
                more = message.get("more_body", False)
