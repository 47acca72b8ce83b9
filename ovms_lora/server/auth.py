"""The check of API keys: a request without one gets nowhere but to the health probes.

    admin key        everything
    tenant's key     the paths of tenants; there only its models
    any other key    everything, but what needs an admin key where there are some

Owns the check, in front of the whole application; it sees the path that is routed. What keys are stands in `keys`.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ovms_lora.server.errors import error_style
from ovms_lora.server.health import PROBES
from ovms_lora.server.keys import ApiKey, digest_of
from ovms_lora.server.tenants import PUBLIC, STATE, Tenant

# What changes the server, and so needs an admin key where there is one.
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/config/reload"})

# What a tenant's key opens; below each the tenant's models are all that it finds.
_TENANT_PATHS = frozenset({"/v2", "/docs", "/openapi.json", "/v1/completions", "/v1/tokenize", "/v1/models"})
_TENANT_FOLDERS = ("/v3/", "/v1/chat/", "/v1/models/", "/v2/")


class ApiKeyMiddleware:
    """Lets requests pass that carry `Authorization: Bearer <key>` with a key that opens their path.

    Without `keys` only the admin paths are closed; without `admin_keys` they are like all others.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[ApiKey], admin_keys: Iterable[ApiKey] = ()) -> None:
        self._app = app
        self._keys = tuple(keys)
        self._admin_keys = tuple(admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401, or 403 where the key is known and opens less."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        admitted = self._admitted(scope["path"], Headers(scope=scope))
        if isinstance(admitted, Tenant):
            scope.setdefault("state", {})[STATE] = admitted
            await self._app(scope, receive, send)
            return
        await error_style(scope["path"]).http(admitted)(scope, receive, send)

    def _admitted(self, path: str, headers: Headers) -> Tenant | HTTPException:
        """Return whose request it is, or what refuses it."""
        for_admins = bool(self._admin_keys) and path in ADMIN_PATHS
        if path in PROBES or not (self._keys or for_admins):
            return PUBLIC
        digest = digest_of(_bearer(headers.getlist("authorization")))
        if _find(digest, self._admin_keys):
            return PUBLIC
        key = _find(digest, self._keys)
        if key is None:
            return HTTPException(401, "Unauthorized", {"WWW-Authenticate": "Bearer"})
        if for_admins:
            return HTTPException(403, "an admin key is needed")
        if key.tenant.name and path not in _TENANT_PATHS and not path.startswith(_TENANT_FOLDERS):
            return HTTPException(403, "this is not for keys of tenants")
        return key.tenant


def _bearer(values: list[str]) -> str:
    """Return the key that is given; empty, which none is, where none or several are."""
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" else ""


def _find(digest: bytes, keys: tuple[ApiKey, ...]) -> ApiKey | None:
    # All keys are compared, so that the time does not tell which one was near.
    found = [key for key in keys if hmac.compare_digest(digest, key.digest)]
    return found[0] if found else None
