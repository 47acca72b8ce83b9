"""`GET /metrics`, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse

from ovms_lora.server.answer_types import OvmsError
from ovms_lora.server.route_docs import responses
from ovms_lora.server.state import state_of

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=PlainTextResponse, responses=responses(OvmsError))
async def metrics(request: Request) -> PlainTextResponse:
    """Return the metrics in Prometheus's text format."""
    server = state_of(request)
    text = await server.workers.block(server.metrics.exposition)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")
