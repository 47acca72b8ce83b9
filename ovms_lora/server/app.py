"""The application: the one place where the parts of a server are put together.

Nothing here is global, so a test can build two. Owns the order of the middlewares and the handlers of errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from ovms_lora import __version__
from ovms_lora.core.errors import EngineError, NoMemoryError, OvmsLoraError
from ovms_lora.server import config_routes, docs_page, health, lora_routes, metrics_route, v1, v3
from ovms_lora.server.access_log import AccessLogMiddleware
from ovms_lora.server.adapter_updates import AdapterUpdates
from ovms_lora.server.admission import AdmissionMiddleware
from ovms_lora.server.auth import ApiKeyMiddleware
from ovms_lora.server.disconnect import ClientGoneError
from ovms_lora.server.early_load import LoadModel
from ovms_lora.server.errors import error_style
from ovms_lora.server.lifecycle import Lifecycle
from ovms_lora.server.limits import LimitsMiddleware
from ovms_lora.server.metrics import Metrics
from ovms_lora.server.model_source import ModelSource
from ovms_lora.server.openapi import completed
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.state import ServerState
from ovms_lora.server.workers import Workers

log = logging.getLogger(__name__)

# What a client that has left would have got; nobody reads it, the access log shows it.
_CLIENT_CLOSED_REQUEST = 499

_ABOUT = (
    "LLMs with many LoRA adapters on OpenVINO. `/v3` is the dialect of OpenVINO Model Server, `/v1` that of OpenAI and "
    "vLLM; they differ in fields, defaults, messages and errors, not in the engine."
)


class _Application(FastAPI):
    """FastAPI with our OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; it is made once."""
        if self.openapi_schema is None:
            server: ServerState = self.state.server
            self.openapi_schema = completed(super().openapi(), server.options)
        return self.openapi_schema


def build_app(
    options: ServerOptions,
    source: ModelSource,
    load: LoadModel,
    *,
    on_failure: Callable[[OvmsLoraError], None] = lambda _: None,
) -> FastAPI:
    """Return the application that serves the models of `source`.

    Models are loaded by `load` once the lifespan begins; `on_failure` hears when none can be.
    """
    registry = ModelRegistry()
    lifecycle = Lifecycle(source, registry, load, options.limits, on_failure=on_failure)
    app = _Application(
        title="ovms-lora",
        description=_ABOUT,
        version=__version__,
        lifespan=_lifespan,
        middleware=[*front(options), Middleware(AdmissionMiddleware)],
        exception_handlers=_HANDLERS,
        redirect_slashes=False,
        openapi_url=None,  # ours, off the event loop
    )
    metrics, workers = Metrics(registry), Workers()
    updates = AdapterUpdates(registry, lifecycle, metrics.lora, workers, options.lora_path_prefixes)
    app.state.server = ServerState(options, registry, lifecycle, updates, metrics, workers)
    # The first one that fits is taken, after all before it were tried: what is asked most stands first.
    for router in (v1.router, v3.router, health.router, config_routes.router, docs_page.router):
        app.include_router(router)
    if options.runtime_lora_updating:
        app.include_router(lora_routes.router)
    if options.metrics:
        app.include_router(metrics_route.router)
    return app


def front(options: ServerOptions) -> list[Middleware]:
    """Return what every request passes first, in this order: log, origins, keys, bounds."""
    stack = [Middleware(AccessLogMiddleware)]
    if options.allowed_origins:
        stack.append(
            Middleware(CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"])
        )
    if options.api_keys or options.admin_keys:
        stack.append(Middleware(ApiKeyMiddleware, keys=options.api_keys, admin_keys=options.admin_keys))
    return [*stack, Middleware(LimitsMiddleware, limits=options.limits)]


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: ServerState = app.state.server
    # Beside the serving, so that probes are answered while models load.
    task = asyncio.create_task(_look_after_models(server.lifecycle, server.options.poll_seconds))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await server.lifecycle.stop()
        server.workers.stop()


async def _look_after_models(lifecycle: Lifecycle, poll_seconds: float) -> None:
    try:
        await lifecycle.start()
        while poll_seconds > 0:
            await asyncio.sleep(poll_seconds)
            await lifecycle.poll()
    except Exception:
        # Not a bad model but a fault of ours: the server must not go on as if it looked after its models.
        log.exception("looking after the models failed")
        lifecycle.fail(EngineError("loading models failed; the log says how"))


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return error_style(request.scope["path"]).response(error)


async def _on_no_memory(request: Request, _error: Exception) -> JSONResponse:
    return error_style(request.scope["path"]).response(NoMemoryError("no memory for the request"))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "the handler is registered for this class only"
    if error.status_code == 405 and request.scope.get("endpoint") is v3.wrong_endpoint:
        error = HTTPException(404)  # only the catch-all of POST knows this path
    return error_style(request.scope["path"]).http(error)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


_HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]] = {
    OvmsLoraError: _on_error,
    HTTPException: _on_http_error,
    ClientGoneError: _on_client_gone,
    MemoryError: _on_no_memory,
}
