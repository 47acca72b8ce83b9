"""The access log: one line per request with its id, which the answer carries too. Never prompts, never keys.

Health probes come every few seconds and say nothing: their lines are for DEBUG.
"""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovms_lora.server.errors import error_style
from ovms_lora.server.health import PROBES
from ovms_lora.server.logs import request_id

log = logging.getLogger("ovms_lora.access")

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AccessLogMiddleware:
    """Gives every request an id (the client's X-Request-Id where it is a plain one) and logs how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log it; answer 500 to what nobody else has caught."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _GIVEN_ID.fullmatch(given) else secrets.token_hex(8)
        request_id.set(own)
        begun, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = own
            await send(message)

        fault: Exception | None = None
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the border of our code: told below, once, with the request's id
            fault = error
            if not status:
                await error_style(scope["path"]).response(error)(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - begun
            level = logging.ERROR if fault else logging.DEBUG if scope["path"] in PROBES else logging.INFO
            path = ascii(scope["path"])[1:-1][:256]
            log.log(level, "%s %s %d %.3fs", scope["method"], path, status, seconds, exc_info=fault)
