"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them; there only with runtime updating on."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from ovms_lora.server.adapter_updates import NewAdapter
from ovms_lora.server.fields import Field, ModelLimits, Table, Together, Values, boolean, text
from ovms_lora.server.generation import read_document, tell_of_unknown
from ovms_lora.server.state import state_of
from ovms_lora.server.v1 import V1

log = logging.getLogger(__name__)

_NAME = Field("lora_name", text("lora_name must be a string"))

_LOAD = Table(
    (
        _NAME,
        Field("lora_path", text("lora_path must be a string")),
        Field("base_model_name", text("base_model_name must be a string")),
        Field("load_inplace", boolean("load_inplace must be true or false")),
        Field("pinned", boolean("pinned must be true or false")),
    ),
    (
        Together(
            "lora_name",
            lambda v, _: not (v.get("lora_name") and v.get("lora_path")),
            "Both 'lora_name' and 'lora_path' must be provided.",
        ),
    ),
)
_UNLOAD = Table(
    (_NAME, Field("lora_int_id")),  # vLLM's number of an adapter, which it ignores itself
    (
        Together(
            "lora_name",
            lambda v, _: not v.get("lora_name"),
            "'lora_name' needs to be provided to unload a LoRA adapter.",
        ),
    ),
)

router = APIRouter(prefix="/v1", tags=["adapters"])


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter from a folder, under a name for `model`."""
    values = await _read(request, _LOAD)
    wanted = NewAdapter(
        alias=values["lora_name"],
        path=values["lora_path"],
        base=values.get("base_model_name"),
        replace=values.get("load_inplace", False),
        pinned=values.get("pinned", False),
    )
    await state_of(request).adapters.load(wanted)
    return PlainTextResponse(f"Success: LoRA adapter '{wanted.alias}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    """Take an adapter away; requests that use it go on."""
    values = await _read(request, _UNLOAD)
    await state_of(request).adapters.unload(values["lora_name"])
    return PlainTextResponse(f"Success: LoRA adapter '{values['lora_name']}' removed successfully.")


async def _read(request: Request, table: Table) -> Values:
    document, _ = await read_document(request, V1)
    values = table.read(document, ModelLimits())
    tell_of_unknown(document, table)
    return values
