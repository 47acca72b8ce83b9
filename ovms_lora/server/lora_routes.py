"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them; there only with runtime updating on."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from ovms_lora.server.adapter_updates import NewAdapter
from ovms_lora.server.answer_types import OpenAIError
from ovms_lora.server.fields import Field, ModelLimits, Table, Values, boolean, text, that
from ovms_lora.server.generation import read_document, tell_of_unknown
from ovms_lora.server.route_docs import body, responses
from ovms_lora.server.state import state_of
from ovms_lora.server.v1 import V1

log = logging.getLogger(__name__)

_BOTH = "Both 'lora_name' and 'lora_path' must be provided."
_NAME_NEEDED = "'lora_name' needs to be provided to unload a LoRA adapter."


def _named(name: str, missing: str) -> Field:
    return Field(name, text(f"{name} must be a string"), that(bool, missing, {"minLength": 1}), missing=missing)


_LOAD = Table(
    (
        _named("lora_name", _BOTH),
        _named("lora_path", _BOTH),
        Field("base_model_name", text("base_model_name must be a string")),
        Field("load_inplace", boolean("load_inplace must be true or false")),
        Field("pinned", boolean("pinned must be true or false")),
    ),
    (),
)
# lora_int_id is vLLM's number of an adapter, which it ignores itself.
_UNLOAD = Table((_named("lora_name", _NAME_NEEDED), Field("lora_int_id")), ())

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post(
    "/load_lora_adapter",
    response_class=PlainTextResponse,
    openapi_extra=body(_LOAD),
    responses=responses(OpenAIError, also=(400, 403, 404, 415, 422, 503), takes_body=True),
)
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter from a folder, under a name for `model`."""
    wanted = wanted_adapter(await _read(request))
    await state_of(request).adapters.load(wanted)
    return PlainTextResponse(f"Success: LoRA adapter '{wanted.alias}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    openapi_extra=body(_UNLOAD),
    responses=responses(OpenAIError, also=(400, 403, 404, 415, 503), takes_body=True),
)
async def unload_lora_adapter(request: Request) -> Response:
    """Take an adapter away; requests that use it go on."""
    alias = unwanted_alias(await _read(request))
    await state_of(request).adapters.unload(alias)
    return PlainTextResponse(f"Success: LoRA adapter '{alias}' removed successfully.")


def wanted_adapter(document: dict[str, Any]) -> NewAdapter:
    """Return the adapter that a request wants loaded. Raises InvalidFieldError."""
    values = _checked(document, _LOAD)
    return NewAdapter(
        alias=values["lora_name"],
        path=values["lora_path"],
        base=values.get("base_model_name"),
        replace=values.get("load_inplace", False),
        pinned=values.get("pinned", False),
    )


def unwanted_alias(document: dict[str, Any]) -> str:
    """Return the alias of the adapter that a request wants gone. Raises InvalidFieldError."""
    alias: str = _checked(document, _UNLOAD)["lora_name"]
    return alias


async def _read(request: Request) -> dict[str, Any]:
    document, _ = await read_document(request, V1)
    return document


def _checked(document: dict[str, Any], table: Table) -> Values:
    values = table.read(document, ModelLimits())
    tell_of_unknown(document, table)
    return values
