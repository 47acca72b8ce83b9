"""Server-sent events: chunks as they come, then `[DONE]`; a failure in between is an event and the end.

Owns the framing; knows nothing of what the chunks say.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.server.async_engine import OutputStream
from ovms_lora.server.disconnect import ClientGoneError, unless_gone
from ovms_lora.server.large_json import dump_json

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + dump_json(document) + b"\n\n"


class EventStream(Response):
    """A response of events that come from `stream`, which is closed when they are sent or the client has gone.

    `on_end` hears then what went wrong, or None.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        stream: OutputStream,
        *,
        error_body: Callable[[Exception], dict[str, Any]],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._stream = stream
        self._error_body = error_body
        self._on_end = on_end

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        failure: BaseException | None = ClientGoneError()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            failure = await unless_gone(receive, self._stream.overrun, self._send_events(send))
        except ClientGoneError:
            log.info("the client left its stream")
        finally:
            self._stream.close()
            self._on_end(failure)

    async def _send_events(self, send: Send) -> Exception | None:
        """Send everything; return what ended the events early, if anything did."""
        failure: Exception | None = None
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except OvmsLoraError as error:
            failure = error
        except Exception as error:  # the status is sent: whatever it was, the client must hear that this is the end
            log.exception("a stream failed")
            failure = error
        last = event(self._error_body(failure)) if failure else DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return failure
