"""`/v1/config`: OVMS's view of all models and their states, and the reload."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from ovms_lora.core.errors import ConfigError, ConfigUnreadableError, OvmsLoraError
from ovms_lora.server.answer_types import OvmsError
from ovms_lora.server.registry import ModelRegistry, ModelState, ModelStatus
from ovms_lora.server.route_docs import responses
from ovms_lora.server.state import state_of
from ovms_lora.server.status_types import Statuses

router = APIRouter(prefix="/v1/config", tags=["config"])


@router.get("", responses=responses(OvmsError, Statuses))
async def config(request: Request) -> JSONResponse:
    """Return the state of every model."""
    return JSONResponse(_statuses(state_of(request).registry))


@router.post(
    "/reload",
    responses={
        **responses(OvmsError, Statuses, also=(412,)),
        201: {"model": Statuses, "description": "Something has changed"},
    },
)
async def reload(request: Request) -> JSONResponse:
    """Read the configuration again: 201 when something has changed, 200 when nothing had to."""
    server = state_of(request)
    try:
        changed = await server.lifecycle.reload()
    except ConfigUnreadableError as error:
        raise ConfigError(f"Config file not found or cannot open. {error.message}", hint=error.hint) from error
    except OvmsLoraError as error:
        raise ConfigError(f"Reloading config file failed. {error.message}", hint=error.hint) from error
    return JSONResponse(_statuses(server.registry), 201 if changed else 200)


def _statuses(registry: ModelRegistry) -> dict[str, Any]:
    """Return the states of the models, and, as if they were models, of the adapters that could not be loaded."""
    failed = {
        alias: ModelStatus(ModelState.LOADING, error.message)
        for served in registry.served
        if (lora := served.model.lora)
        for alias, error in lora.failures.items()
        if not lora.has(alias)
    }
    statuses = {**failed, **registry.statuses}
    return {name: {"model_version_status": [_status(statuses[name])]} for name in (*registry.statuses, *failed)}


def _status(status: ModelStatus) -> dict[str, Any]:
    code, message = ("FAILED_PRECONDITION", status.error) if status.error else ("OK", "OK")
    return {
        "version": str(status.version),
        "state": status.state.value,
        "status": {"error_code": code, "error_message": message},
    }
