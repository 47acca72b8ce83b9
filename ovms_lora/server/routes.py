"""The routes that both dialects have: they differ in the Dialect alone."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from ovms_lora.server.adapter_choice import AdapterChoice
from ovms_lora.server.dialects import Dialect
from ovms_lora.server.generation import generate, read_document
from ovms_lora.server.large_json import dump_json
from ovms_lora.server.model_cards import card_of, listed_cards
from ovms_lora.server.route_docs import body, responses, streamed
from ovms_lora.server.state import state_of
from ovms_lora.server.tenants import tenant_of


def dialect_router(dialect: Dialect) -> APIRouter:
    """Return the routes of one dialect below its prefix."""
    router = APIRouter(prefix=dialect.prefix, tags=[dialect.prefix.strip("/")])
    types = dialect.answers
    error, failures = types.error, (*types.statuses, 429, 504)

    @router.post(
        "/completions",
        openapi_extra=body(dialect.completions.table, dialect.head),
        responses=streamed(responses(error, types.completion, also=failures, takes_body=True), types.completion_chunk),
    )
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await generate(request, dialect, dialect.completions)

    @router.post(
        "/chat/completions",
        openapi_extra=body(dialect.chat.table, dialect.head),
        responses=streamed(responses(error, types.chat, also=failures, takes_body=True), types.chat_chunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, dialect, dialect.chat)

    @router.post(
        "/tokenize",
        openapi_extra=body(dialect.tokenize_fields, dialect.head),
        responses=responses(error, types.tokens, also=types.statuses, takes_body=True),
    )
    async def tokenize(request: Request) -> Response:
        """Return the tokens of a text."""
        document, size = await read_document(request, dialect)
        server = state_of(request)
        selection = await server.select(dialect.model_name(document, server.registry), tenant_of(request))
        model, limits = selection.served.model, selection.served.limits(server.options.limits)
        if "messages" in document:
            uses = await server.uses(selection, AdapterChoice())
            content = await server.render(uses, lambda: dump_json(dialect.tokenize(document, limits, model, uses)))
        else:
            content = await server.workers.run(size, lambda: dump_json(dialect.tokenize(document, limits, model, ())))
        return Response(content, media_type="application/json")

    @router.get("/models", responses=responses(error, types.cards))
    async def models(request: Request) -> Response:
        """List the served models, then their adapters."""
        server, tenant = state_of(request), tenant_of(request)
        cards = await server.workers.block(listed_cards, server.registry.served)
        return JSONResponse({"object": "list", "data": [dialect.card(card) for card in cards if card.is_for(tenant)]})

    @router.get("/models/{name:path}", responses=responses(error, types.card, also=(400, 404)))
    async def model(request: Request, name: str) -> Response:
        """Describe one model, adapter or composite."""
        server = state_of(request)
        card = await server.workers.block(card_of, server.registry.served, name)
        if card is None or not card.is_for(tenant_of(request)):
            return dialect.no_such_card(name)
        return JSONResponse(dialect.card(card))

    return router
