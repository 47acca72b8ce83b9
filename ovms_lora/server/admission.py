"""Admission: requests for text are refused by their head while the model has no room for another one.

Under an overload most requests are refused. So that is done before anything is read, routed or parsed, and costs a part
of what the way to the engine does. Which model is asked stands in the body: with several of them `generation` refuses.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from ovms_lora.core.errors import QueueFullError
from ovms_lora.server.errors import error_style
from ovms_lora.server.state import ServerState
from ovms_lora.server.tenants import PUBLIC, STATE, Tenant

_APIS = {
    "/v3/completions": "V3",
    "/v3/chat/completions": "V3",
    "/v1/completions": "V1",
    "/v1/chat/completions": "V1",
}


class AdmissionMiddleware:
    """Answers 429 while the queue of the only model is full, or the tenant's share of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        refusal = _refusal(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if refusal:
            # What comes of the body is left to the connection, which throws it away.
            await error_style(scope["path"]).response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _refusal(scope: Scope) -> QueueFullError | None:
    server: ServerState = scope["app"].state.server
    api, served = _APIS.get(scope["path"]), server.registry.served
    if api is None or len(served) != 1 or server.lifecycle.draining:
        return None
    tenant: Tenant = scope.get("state", {}).get(STATE, PUBLIC)
    try:
        served[0].model.engine.check_room(tenant.name, tenant.queue_share)
    except QueueFullError as error:
        server.metrics.refuse(api, served[0].name)
        return error
    return None
