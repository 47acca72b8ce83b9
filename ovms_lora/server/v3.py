"""`/v3`: the OVMS dialect: its value of Dialect, and its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ovms_lora.core.errors import InvalidFieldError, MalformedBodyError, ModelNotFoundError
from ovms_lora.server import answer_types, v3_fields
from ovms_lora.server.chat_shape import ChatShape
from ovms_lora.server.dialects import AnswerTypes, Dialect, Endpoint
from ovms_lora.server.errors import OVMS_ERRORS
from ovms_lora.server.generation import read_document
from ovms_lora.server.model_cards import ModelCard
from ovms_lora.server.prompts import chat_prompts, completion_prompts
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.routes import dialect_router
from ovms_lora.server.shapes import CompletionShape, ShapeStyle
from ovms_lora.server.state import state_of
from ovms_lora.server.tenants import tenant_of
from ovms_lora.server.tokenize import OVMS, ovms_tokenize

_ENDPOINTS = "/v3/chat/completions, /v3/completions, /v3/tokenize"


def _check_content_type(content_type: str) -> None:
    # OVMS looks for a graph that takes such a body, and has none.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ModelNotFoundError("")


def _model_name(document: Mapping[str, Any], _: ModelRegistry) -> str:
    if "model" not in document:
        raise MalformedBodyError("model field is missing in JSON body")
    if not isinstance(document["model"], str):
        raise MalformedBodyError("model field is not a string")
    if not isinstance(document.get("stream", False), bool):
        raise MalformedBodyError("stream field is not a boolean")
    return str(document["model"])


def _card(card: ModelCard) -> dict[str, Any]:
    # OVMS's card; only what OVMS has no cards for, an adapter, says more.
    more = {} if card.parent is None else {"root": card.root, "parent": card.parent}
    return {"id": card.name, "object": "model", "created": card.served.created, "owned_by": "OVMS", **more}


def _no_such_card(_: str) -> Response:
    return JSONResponse({"error": "Model not found"}, 404)


V3 = Dialect(
    name="V3",
    prefix="/v3",
    completions=Endpoint("cmpl", v3_fields.COMPLETIONS, completion_prompts, CompletionShape),
    chat=Endpoint("chatcmpl", v3_fields.CHAT, chat_prompts, ChatShape, is_chat=True),
    defaults=v3_fields.DEFAULTS,
    errors=OVMS_ERRORS,
    style=ShapeStyle(completion_chunk="text_completion.chunk", openai=False),
    check_content_type=_check_content_type,
    model_name=_model_name,
    head={"properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}}, "required": ["model"]},
    tokenize_fields=OVMS,
    tokenize=ovms_tokenize,
    card=_card,
    no_such_card=_no_such_card,
    answers=AnswerTypes(
        completion=answer_types.CompletionV3,
        completion_chunk=answer_types.CompletionChunkV3,
        chat=answer_types.ChatV3,
        chat_chunk=answer_types.ChatChunkV3,
        tokens=answer_types.TokensV3,
        card=answer_types.CardV3,
        cards=answer_types.CardsV3,
        error=answer_types.OvmsError,
        statuses=(400, 404, 412, 503),
    ),
)

router = dialect_router(V3)


@router.post("/{path:path}", include_in_schema=False)
async def wrong_endpoint(request: Request) -> Response:
    """Refuse a path that OVMS would hand to a graph, with the graph's answer."""
    document, _ = await read_document(request, V3)
    server = state_of(request)
    await server.select(_model_name(document, server.registry), tenant_of(request))
    raise InvalidFieldError(f"Wrong endpoint. Allowed endpoints: {_ENDPOINTS}")
