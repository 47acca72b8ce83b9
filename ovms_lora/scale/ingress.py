"""Ingress: what clients talk to. It checks who asks and how much, finds the adapters named, and passes the rest on.

    probes of life          answered here
    /metrics                those of all replicas together
    what changes adapters   to the ledger, so that every replica does it
    all else                to one replica, whose answer is passed on as it comes

Both dialects are the replicas' own; here an answer is made only where no replica could make one.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovms_lora.core.errors import OvmsLoraError, UnavailableError
from ovms_lora.scale.adapter_key import adapter_key
from ovms_lora.scale.config import ScaleConfig
from ovms_lora.scale.engines import Engines
from ovms_lora.scale.exchange import Forwarded, Relay, received_body
from ovms_lora.server import logs
from ovms_lora.server.app import front
from ovms_lora.server.auth import ADMIN_PATHS
from ovms_lora.server.disconnect import ClientGoneError, unless_gone
from ovms_lora.server.errors import error_style
from ovms_lora.server.sse import event
from ovms_lora.server.workers import Workers

log = logging.getLogger(__name__)

_LIVE = frozenset({"/v2/health/live", "/health", "/ping"})


class Ingress:
    """One ingress; Serve makes it and gives it requests as to any ASGI application."""

    def __init__(self, config: ScaleConfig, engines: DeploymentHandle[Any], ledger: DeploymentHandle[Any]) -> None:
        logs.configure(config.options.log_level)
        self._options = config.options
        self._engines = Engines(engines, config.options.limits)
        self._ledger = ledger
        self._version = 0  # of the ledger, as far as this ingress has a part in it
        self._workers = Workers()
        self._draining = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application: as every server's, behind log, origins, keys and bounds."""
        app: ASGIApp = self._answer
        for layer in reversed(front(self._options)):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return _with_lifespan(app)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, asks = scope["path"], scope["method"] == "GET"
        if asks and path in _LIVE:
            await Response()(scope, receive, send)
        elif asks and path == "/metrics" and self._options.metrics:
            await self._metrics(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    def drain(self) -> None:
        """Refuse new requests from now on; those that run go on."""
        self._draining = True

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await self._engines.metrics()
        await PlainTextResponse(text, media_type="text/plain; version=0.0.4")(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await received_body(receive)
        if body is None:
            return
        relay = Relay(send)
        try:
            if self._draining:
                raise UnavailableError("the server is shutting down")
            request = Forwarded.of(scope, body, logs.request_id.get(), self._version)
            key = await self._workers.run(len(body), adapter_key, scope["method"], scope["path"], body)
            is_update = scope["method"] == "POST" and scope["path"] in ADMIN_PATHS
            work = self._updated(request, key, relay) if is_update else self._relayed(request, key, relay)
            await unless_gone(receive, asyncio.Event(), work)
        except ClientGoneError:
            log.info("the client left")
        except OvmsLoraError as error:
            await self._tell(error, relay, scope, receive)

    async def _relayed(self, request: Forwarded, key: str, relay: Relay) -> None:
        async with aclosing(self._engines.answer(request, key)) as messages:
            async for message in messages:
                await relay(message)

    async def _updated(self, request: Forwarded, key: str, relay: Relay) -> None:
        messages, version = await self._ledger.update.remote(request, key)
        self._version = max(self._version, version)
        for message in messages:
            await relay(message)

    async def _tell(self, error: OvmsLoraError, relay: Relay, scope: Scope, receive: Receive) -> None:
        """Tell the client, in its dialect, why there is no answer or no end of it."""
        style = error_style(scope["path"])
        if not relay.started:
            await style.response(error)(scope, receive, relay)
        elif relay.is_event_stream and not relay.ended:
            log.warning("a stream was cut: %s", error.message)
            await relay({"type": "http.response.body", "body": event(style.body(error)), "more_body": False})
        elif not relay.ended:
            raise error  # half a JSON document: the connection ends, so that nobody takes it for a whole one


def _with_lifespan(app: ASGIApp) -> ASGIApp:
    """Answer the messages of a lifespan; there is nothing to begin or to end."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        message: Message = {"type": ""}
        while message["type"] != "lifespan.shutdown":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})

    return answering
