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
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovms_lora.core.errors import EngineError, OvmsLoraError, UnavailableError
from ovms_lora.scale.adapter_key import adapter_key
from ovms_lora.scale.engines import Engines
from ovms_lora.scale.exchange import Forwarded, Relay, received_body
from ovms_lora.scale.own_server import OwnServer
from ovms_lora.scale.ray_errors import RAY_ERRORS
from ovms_lora.server import logs
from ovms_lora.server.app import front
from ovms_lora.server.auth import ADMIN_PATHS
from ovms_lora.server.disconnect import ClientGoneError, unless_gone
from ovms_lora.server.errors import error_style
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.sse import event
from ovms_lora.server.workers import Workers

log = logging.getLogger(__name__)

_CUT_SECONDS = 1.0  # in which a request that was cut tells its client
_LIVE = frozenset({"/v2/health/live", "/health", "/ping"})


class Ingress:
    """One ingress; Serve makes it, and its proxy gives it requests, as to any ASGI application.

    With a `port` it also answers there itself.
    """

    def __init__(
        self, options: ServerOptions, engines: DeploymentHandle[Any], ledger: DeploymentHandle[Any], port: int | None
    ) -> None:
        logs.configure(options.log_level)
        self._options = options
        self._engines = Engines(engines, options.limits)
        self._ledger = ledger
        self._version = 0  # of the ledger, as far as this ingress has a part in it
        self._workers = Workers()
        self._draining = False
        self._at_work = set[asyncio.Task[None]]()  # on requests that were passed on and have not ended
        self._app: ASGIApp = self._answer  # as every server's behind log, origins, keys and bounds
        for layer in reversed(front(options)):
            self._app = layer.cls(self._app, *layer.args, **layer.kwargs)
        self._own_server = OwnServer(self._app, options, port) if port else None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application as Serve runs it, with a lifespan."""

        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await self._live(receive, send)
            else:
                await self._app(scope, receive, _without_id(send))

        return served

    def check_health(self) -> None:
        """Raise EngineError where nobody can ask any more; Serve then replaces the ingress."""
        if self._own_server and not (self._own_server.answers or self._draining):
            raise EngineError("the ingress does not answer on its port any more")

    async def drain(self) -> None:
        """Refuse new requests from now on; return when those that run have ended, or were cut after their time.

        On a port of its own, clients have then got what was sent.
        """
        self._draining = True
        if running := set(self._at_work):
            _, late = await asyncio.wait(running, timeout=self._options.limits.drain_seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_CUT_SECONDS)
        if self._own_server:
            await self._own_server.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        if self._own_server:
            await self._own_server.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.drain()  # of what came to its own port Serve does not know
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay, style = Relay(send), error_style(scope["path"])
        try:
            if scope["method"] == "GET" and scope["path"] in _LIVE:
                await Response()(scope, receive, relay)
            elif self._draining:
                raise UnavailableError("the server is shutting down")
            elif scope["method"] == "GET" and scope["path"] == "/metrics" and self._options.metrics:
                await _PlainMetrics(await self._engines.metrics())(scope, receive, relay)
            else:
                await self._work(self._pass_on(scope, receive, relay))
        except HTTPException as error:  # a bound on the body
            await style.http(error)(scope, receive, relay)
        except ClientGoneError:
            if not relay.ended:  # who has got the whole answer may go
                log.info("the client left")
        except OvmsLoraError as error:
            if relay.started:
                await _cut(relay, error, event(style.body(error)))
            else:
                await style.response(error)(scope, receive, relay)

    async def _work(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it in a task that a drain waits for. Raises UnavailableError when that has waited long enough."""
        task = asyncio.create_task(work)
        self._at_work.add(task)
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current and current.cancelling():
                raise
            raise UnavailableError("the server is shutting down") from None
        finally:
            self._at_work.discard(task)

    async def _pass_on(self, scope: Scope, receive: Receive, relay: Relay) -> None:
        body, method, path = await received_body(receive), scope["method"], scope["path"]
        request = Forwarded.of(scope, body, logs.request_id.get(), self._version)
        key = await self._workers.run(len(body), adapter_key, method, path, body)
        is_update = method == "POST" and path in ADMIN_PATHS
        work = self._updated(request, key, relay) if is_update else self._relayed(request, key, relay)
        await unless_gone(receive, asyncio.Event(), work)

    async def _relayed(self, request: Forwarded, key: str, relay: Relay) -> None:
        async with aclosing(self._engines.answer(request, key)) as messages:
            async for message in messages:
                await relay(message)

    async def _updated(self, request: Forwarded, key: str, relay: Relay) -> None:
        try:
            messages, version = await self._ledger.update.remote(request, key)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, OvmsLoraError) else error) from None
        except RAY_ERRORS as error:
            raise UnavailableError("changes cannot be made now") from error
        self._version = max(self._version, version)
        for message in messages:
            await relay(message)


class _PlainMetrics(PlainTextResponse):
    """Metrics in Prometheus's text format."""

    media_type = "text/plain; version=0.0.4"


async def _cut(relay: Relay, error: OvmsLoraError, last_event: bytes) -> None:
    """End an answer that has begun: a stream says why. Raises the error where nothing can be said."""
    log.warning("an answer was cut: %s", error.message)
    if relay.is_event_stream:
        await relay({"type": "http.response.body", "body": last_event, "more_body": False})
    else:  # half a document: the connection ends, so that nobody takes it for a whole one
        raise error


def _without_id(send: Send) -> Send:
    """Return a `send` that leaves out our header of a request's id: Serve's proxy adds its own."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            del MutableHeaders(scope=message)["x-request-id"]
        await send(message)

    return send_on
