"""`/v3`: the OVMS dialect: its value of Dialect, and its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ovms_lora.core.errors import InvalidFieldError, MalformedBodyError, ModelNotFoundError
from ovms_lora.server import v3_fields
from ovms_lora.server.dialects import Dialect, Endpoint
from ovms_lora.server.errors import OVMS_ERRORS
from ovms_lora.server.generation import generate, read_document
from ovms_lora.server.model_cards import ModelCard, card_of, listed_cards
from ovms_lora.server.prompts import chat_prompts, completion_prompts
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.shapes import ChatShape, CompletionShape, ShapeStyle
from ovms_lora.server.state import state_of
from ovms_lora.server.tokenize import ovms_tokenize

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


V3 = Dialect(
    name="V3",
    completions=Endpoint("cmpl", v3_fields.COMPLETIONS, completion_prompts, CompletionShape),
    chat=Endpoint("chatcmpl", v3_fields.CHAT, chat_prompts, ChatShape),
    defaults=v3_fields.DEFAULTS,
    errors=OVMS_ERRORS,
    style=ShapeStyle(completion_chunk="text_completion.chunk", openai=False),
    check_content_type=_check_content_type,
    model_name=_model_name,
)

router = APIRouter(prefix="/v3", tags=["v3"])


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continue a text."""
    return await generate(request, V3, V3.completions)


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await generate(request, V3, V3.chat)


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Return the tokens of texts."""
    document, size = await read_document(request, V3)
    server = state_of(request)
    model = (await server.select(_model_name(document, server.registry))).served.model
    return JSONResponse(await server.workers.run(size, ovms_tokenize, document, model))


@router.get("/models")
async def models(request: Request) -> Response:
    """List the served models, then their adapters."""
    server = state_of(request)
    cards = await server.workers.block(listed_cards, server.registry.served)
    return JSONResponse({"object": "list", "data": [_card(card) for card in cards]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe one model, adapter or composite."""
    server = state_of(request)
    card = await server.workers.block(card_of, server.registry.served, name)
    if card is None:
        return JSONResponse({"error": "Model not found"}, 404)
    return JSONResponse(_card(card))


@router.post("/{path:path}", include_in_schema=False)
async def wrong_endpoint(request: Request) -> Response:
    """Refuse a path that OVMS would hand to a graph, with the graph's answer."""
    document, _ = await read_document(request, V3)
    server = state_of(request)
    await server.select(_model_name(document, server.registry))
    raise InvalidFieldError(f"Wrong endpoint. Allowed endpoints: {_ENDPOINTS}")


def _card(card: ModelCard) -> dict[str, Any]:
    # OVMS's card; only what OVMS has no cards for, an adapter, says more.
    more = {} if card.parent is None else {"root": card.root, "parent": card.parent}
    return {"id": card.name, "object": "model", "created": card.served.created, "owned_by": "OVMS", **more}
