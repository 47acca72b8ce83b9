"""`/v1`: the OpenAI dialect with vLLM's extras: its value of Dialect, and its routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from ovms_lora.core.errors import InvalidFieldError, ModelNotFoundError
from ovms_lora.server import answer_types, v1_fields
from ovms_lora.server.chat_shape import ChatShape
from ovms_lora.server.dialects import AnswerTypes, Dialect, Endpoint
from ovms_lora.server.errors import OPENAI_ERRORS
from ovms_lora.server.model_cards import ModelCard
from ovms_lora.server.prompts import chat_prompts, completion_prompts
from ovms_lora.server.registry import ModelRegistry
from ovms_lora.server.routes import dialect_router
from ovms_lora.server.shapes import CompletionShape, ShapeStyle
from ovms_lora.server.tokenize import VLLM, vllm_tokenize

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


def _no_such_card(name: str) -> Response:
    raise ModelNotFoundError(name)


V1 = Dialect(
    name="V1",
    prefix="/v1",
    completions=Endpoint("cmpl", v1_fields.COMPLETIONS, completion_prompts, CompletionShape, _DEFAULT_TOKENS),
    chat=Endpoint("chatcmpl", v1_fields.CHAT, chat_prompts, ChatShape, is_chat=True),
    defaults=v1_fields.DEFAULTS,
    errors=OPENAI_ERRORS,
    style=ShapeStyle(completion_chunk="text_completion", openai=True),
    check_content_type=_check_content_type,
    model_name=_model_name,
    head={"properties": {"model": {"type": ["string", "null"]}}},
    tokenize_fields=VLLM,
    tokenize=vllm_tokenize,
    card=_card,
    no_such_card=_no_such_card,
    answers=AnswerTypes(
        completion=answer_types.CompletionV1,
        completion_chunk=answer_types.CompletionChunkV1,
        chat=answer_types.ChatV1,
        chat_chunk=answer_types.ChatChunkV1,
        tokens=answer_types.TokensV1,
        card=answer_types.CardV1,
        cards=answer_types.CardsV1,
        error=answer_types.OpenAIError,
        statuses=(400, 404, 415, 422, 503),
    ),
)

router = dialect_router(V1)
