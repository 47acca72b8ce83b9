"""Probes and descriptions: KServe's `/v2`, and vLLM's `/health` and `/ping`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ovms_lora import __version__
from ovms_lora.server.answer_types import OvmsError
from ovms_lora.server.route_docs import Responses, responses
from ovms_lora.server.state import state_of
from ovms_lora.server.status_types import ModelMetadata, ServerMetadata
from ovms_lora.server.tenants import tenant_of

# What may be asked without a key.
PROBES = frozenset({"/v2/health/live", "/v2/health/ready", "/health", "/ping"})

_MODEL_NOT_FOUND = "Model with requested name is not found"

_PROBED: Responses = {200: {"description": "Yes"}, 503: {"description": "No, or not now"}}
_MODEL_FAILURES = responses(OvmsError, also=(400, 404))

router = APIRouter(tags=["health"])


@router.get("/v2", responses=responses(OvmsError, ServerMetadata))
async def server_metadata() -> JSONResponse:
    """Say what server this is."""
    return JSONResponse({"name": "ovms-lora", "version": __version__, "extensions": []})


@router.get("/v2/health/live", response_class=Response, responses=_PROBED)
@router.get("/health", response_class=Response, responses=_PROBED)
@router.get("/ping", response_class=Response, responses=_PROBED)
async def live(request: Request) -> Response:
    """Answer 200 while the event loop and the engines turn."""
    return _probe(state_of(request).lifecycle.live)


@router.get("/v2/health/ready", response_class=Response, responses=_PROBED)
async def ready(request: Request) -> Response:
    """Answer 200 while requests are taken."""
    return _probe(state_of(request).lifecycle.ready)


@router.get("/v2/models/{name:path}/ready", response_class=Response, responses={**_MODEL_FAILURES, **_PROBED})
# The last one is looked at first.
@router.get(
    "/v2/models/{name:path}/versions/{version:int}/ready",
    response_class=Response,
    responses={**_MODEL_FAILURES, **_PROBED},
)
async def model_ready(request: Request, name: str) -> Response:
    """Answer 200 while one model, adapter or composite takes requests; the version is not looked at, as for graphs."""
    server = state_of(request)
    if _is_hidden(request, name):
        return _not_found()
    status = server.registry.statuses.get(name)
    if server.registry.get(name) or server.registry.base_of(name):
        return _probe(server.lifecycle.ready)
    return _not_found() if status is None else _probe(False)


@router.get("/v2/models/{name:path}", responses=responses(OvmsError, ModelMetadata, also=(400, 404)))
# The last one is looked at first.
@router.get(
    "/v2/models/{name:path}/versions/{version:int}", responses=responses(OvmsError, ModelMetadata, also=(400, 404))
)
async def model_metadata(request: Request, name: str) -> Response:
    """Describe one model, adapter or composite, as OVMS does a graph: its streams are no tensors."""
    registry = state_of(request).registry
    served = registry.get(name) or registry.base_of(name)
    if served is None or _is_hidden(request, name):
        return _not_found()
    streams = {key: [{"name": key.rstrip("s"), "datatype": "INVALID", "shape": []}] for key in ("inputs", "outputs")}
    return JSONResponse({"name": name, "versions": [str(served.spec.version)], "platform": "OpenVINO", **streams})


def _is_hidden(request: Request, name: str) -> bool:
    """Whether a model, adapter or composite is not the tenant's."""
    registry, tenant = state_of(request).registry, tenant_of(request)
    base = None if registry.get(name) else registry.base_of(name)
    return not (tenant.allows(base.name, name) if base else tenant.allows(name))


def _not_found() -> Response:
    return JSONResponse({"error": _MODEL_NOT_FOUND}, 404)


def _probe(good: bool) -> Response:
    return Response(status_code=200 if good else 503)
