"""API keys: a request without one gets nowhere but to the health probes.

Owns the check, in front of the whole application. Keys are kept as hashes and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ovms_lora.server.errors import error_style
from ovms_lora.server.health import PROBES


class ApiKeyMiddleware:
    """Lets requests pass that carry `Authorization: Bearer <key>` with one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._hashes = [_hash(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in PROBES or self._allowed(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        refusal = HTTPException(401, "Unauthorized", {"WWW-Authenticate": "Bearer"})
        await error_style(scope["path"]).http(refusal)(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip())
        # All keys are compared, so that the time does not tell which one was near.
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(matches)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
