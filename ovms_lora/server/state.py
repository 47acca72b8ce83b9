"""ServerState: the parts of one server, as its request handlers find them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from ovms_lora.core.errors import UnavailableError
from ovms_lora.server.lifecycle import Lifecycle
from ovms_lora.server.metrics import Metrics
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.registry import ModelRegistry, Selection
from ovms_lora.server.workers import Workers


@dataclass(frozen=True, slots=True)
class ServerState:
    """The parts of one server."""

    options: ServerOptions
    registry: ModelRegistry
    lifecycle: Lifecycle
    metrics: Metrics
    workers: Workers

    def select(self, model: str) -> Selection:
        """Return what a request's `model` selects. Raises UnavailableError while the server drains."""
        if self.lifecycle.draining:
            raise UnavailableError("the server is shutting down")
        return self.registry.resolve(model)


def state_of(request: Request) -> ServerState:
    """Return the state of the server that a request came to."""
    state: ServerState = request.app.state.server
    return state
