"""`/v1`: the OpenAI dialect with vLLM's extras: its value of Dialect, and its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ovms_lora.core.errors import InvalidFieldError, ModelNotFoundError
from ovms_lora.server import v1_fields
from ovms_lora.server.dialects import Dialect, Endpoint
from ovms_lora.server.errors import OPENAI_ERRORS
from ovms_lora.server.generation import generate, read_document
from ovms_lora.server.model_cards import ModelCard, card_of, listed_cards
from ovms_lora.server.prompts import chat_prompts, completion_prompts
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.shapes import ChatShape, CompletionShape, ShapeStyle
from ovms_lora.server.state import state_of
from ovms_lora.server.tokenize import vllm_tokenize

_DEFAULT_TOKENS = 16


def _check_content_type(content_type: str) -> None:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Unsupported Media Type: Only 'application/json' is allowed")


def _model_name(document: Mapping[str, Any], registry: ModelRegistry) -> str:
    model = document.get("model")
    if isinstance(model, str):
        return model
    if model is not None:
        raise InvalidFieldError("model must be a string", param="model")
    if len(registry.served) != 1:
        raise InvalidFieldError("model is missing, and several models are served", param="model")
    return registry.served[0].name


V1 = Dialect(
    name="V1",
    completions=Endpoint("cmpl", v1_fields.COMPLETIONS, completion_prompts, CompletionShape, _DEFAULT_TOKENS),
    chat=Endpoint("chatcmpl", v1_fields.CHAT, chat_prompts, ChatShape),
    defaults=v1_fields.DEFAULTS,
    errors=OPENAI_ERRORS,
    style=ShapeStyle(completion_chunk="text_completion", openai=True),
    check_content_type=_check_content_type,
    model_name=_model_name,
)

router = APIRouter(prefix="/v1", tags=["v1"])


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continue a text."""
    return await generate(request, V1, V1.completions)


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await generate(request, V1, V1.chat)


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Return the tokens of a prompt or of messages."""
    document, size = await read_document(request, V1)
    server = state_of(request)
    model = (await server.select(_model_name(document, server.registry))).served.model
    return JSONResponse(await server.workers.run(size, vllm_tokenize, document, model))


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
        raise ModelNotFoundError(name)
    return JSONResponse(_card(card))


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.served.created,
        "owned_by": "ovms-lora",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": card.served.model.engine.max_model_len,
    }
