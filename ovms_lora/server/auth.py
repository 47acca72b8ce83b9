"""API keys: a request without one gets nowhere but to the health probes; an admin key opens everything.

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

# What changes the server, and so needs an admin key where there is one.
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class ApiKeyMiddleware:
    """Lets requests pass that carry `Authorization: Bearer <key>` with a key that opens their path.

    Without `keys` only the admin paths are closed; without `admin_keys` they are like all others.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        self._app = app
        self._hashes = [_hash(key) for key in keys]
        self._admin_hashes = [_hash(key) for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401, or 403 where the key is known and opens less."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        await error_style(scope["path"]).http(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        for_admins = bool(self._admin_hashes) and scope["path"] in ADMIN_PATHS
        if scope["path"] in PROBES or not (self._hashes or for_admins):
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _hash(key.strip()) if scheme.lower() == "bearer" else b""
        is_admin, is_client = _known(given, self._admin_hashes), _known(given, self._hashes)
        if is_admin or (is_client and not for_admins):
            return None
        if is_client:
            return HTTPException(403, "an admin key is needed")
        return HTTPException(401, "Unauthorized", {"WWW-Authenticate": "Bearer"})


def _known(given: bytes, hashes: list[bytes]) -> bool:
    # All keys are compared, so that the time does not tell which one was near.
    return any([hmac.compare_digest(given, known) for known in hashes])


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
