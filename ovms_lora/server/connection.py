"""One connection, as uvicorn and h11 speak HTTP on it, with bounds on how long a client may keep it waiting.

Owns the number of connections, the time in which a request's head must come, and the time in which what is sent must
be taken. What stands in a request is bounded by `limits`.
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ovms_lora.server.options import Limits

log = logging.getLogger(__name__)


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1, but who is slow to ask (408) or to read loses the connection.

    The clock of a head runs from the first moment at which no request is being answered and the client may speak.
    """

    def __init__(self, limits: Limits, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin, or refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections", (b"retry-after", b"1"))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the first ones after an answer are the next head."""
        if self._head_timer is None and not self._answering:
            self._await_head()
        super().data_received(data)
        if self._answering:
            self._stop_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; no timer outlives its connection."""
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read; not for ever."""
        super().pause_writing()
        self._stop_send_timer()
        self._send_timer = self.loop.call_later(self._limits.send_seconds, self._on_stalled)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_send_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or a head that goes on and on."""
        received, _ = self.conn.trailing_data
        if len(received) > self._limits.header_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too large")
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    @property
    def _answering(self) -> bool:
        """Whether a request has come whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.receive_seconds, self._on_no_head)

    def _on_no_head(self) -> None:
        self._head_timer = None
        received, _ = self.conn.trailing_data
        if received and self.conn.our_state is h11.IDLE:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the headers took too long to come")
        else:
            self.transport.close()

    def _on_stalled(self) -> None:
        log.info("a client does not read its answer: the connection is cut")
        self.transport.abort()

    def _refuse(self, status: HTTPStatus, message: str, *headers: tuple[bytes, bytes]) -> None:
        """Answer without the application, and close: nothing is known of the request, not even its dialect."""
        body = b'{"error":"%s"}' % message.encode("ascii")
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        response = h11.Response(
            status_code=status, headers=[*head, (b"connection", b"close")], reason=status.phrase.encode()
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
