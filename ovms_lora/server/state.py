"""ServerState: the parts of one server, as its request handlers find them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from ovms_lora.core.constraint import TokenConstraint
from ovms_lora.core.errors import ForbiddenError, ModelNotFoundError, UnavailableError
from ovms_lora.core.request import AdapterUse
from ovms_lora.server.adapter_choice import AdapterChoice
from ovms_lora.server.adapter_updates import AdapterUpdates
from ovms_lora.server.arrivals import arrive, is_found
from ovms_lora.server.constraints import AskedConstraint
from ovms_lora.server.lifecycle import Lifecycle
from ovms_lora.server.metrics import Metrics
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.registry import ModelRegistry, Selection
from ovms_lora.server.tenants import Tenant
from ovms_lora.server.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerState:
    """The parts of one server."""

    options: ServerOptions
    registry: ModelRegistry
    lifecycle: Lifecycle
    adapters: AdapterUpdates
    metrics: Metrics
    workers: Workers

    async def select(self, model: str, tenant: Tenant) -> Selection:
        """Return what a request's `model` selects; an unknown one is looked for on the loading paths.

        Raises ModelNotFoundError, ForbiddenError for what is not the tenant's, or UnavailableError while the model is
        loaded or the server drains.
        """
        if self.lifecycle.draining:
            raise UnavailableError("the server is shutting down")
        try:
            selection = await self._find(model)
        except (ModelNotFoundError, UnavailableError):
            if tenant.names_exactly(model):
                raise
            raise ForbiddenError(model) from None
        if self.lifecycle.draining:  # since then
            raise UnavailableError("the server is shutting down")
        if not tenant.allows(selection.served.name, selection.alias):
            raise ForbiddenError(model)
        return selection

    async def _find(self, model: str) -> Selection:
        try:
            return self.registry.resolve(model)
        except ModelNotFoundError as unknown:
            failure: ModelNotFoundError | UnavailableError = unknown
            for selection in self.registry.on_loading_paths(model):
                try:
                    if await is_found(selection, self.workers):
                        return selection
                except UnavailableError as error:
                    failure = error
            raise failure from None

    async def constraint(self, selection: Selection, asked: AskedConstraint | None) -> TokenConstraint | None:
        """Return what the text of a request must match, compiled. Raises InvalidFieldError when it does not compile."""
        if asked is None:
            return None
        compiler = selection.served.model.constraints
        kept = compiler.kept(asked.spec)
        return kept or await self.workers.compile(
            compiler.compile, asked.spec, param=asked.param, schema_bytes=self.options.limits.schema_bytes
        )

    async def render(self, uses: tuple[AdapterUse, ...], work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`, which renders the chat template for these adapters, in a thread."""
        own = len(uses) == 1 and uses[0].adapter.chat_template is not None
        return await (self.workers.render if own else self.workers.compute)(work, *args, **kwargs)

    async def uses(self, selection: Selection, choice: AdapterChoice) -> tuple[AdapterUse, ...]:
        """Return the adapters of a request, loaded if they were not. Raises what `AdapterChoice.uses` does."""
        lora, names = selection.served.model.lora, choice.names(selection)
        if lora is None or not names:
            return ()
        missing = [name for name in names if not lora.has(name)]
        with contextlib.ExitStack() as measured:
            for name in missing:
                measured.enter_context(self.metrics.lora.loading(name, is_known=name in lora.failures))
            with choice.told(selection):
                await arrive(lora, names, self.workers)
            return await self.workers.block(choice.uses, selection)


def state_of(request: Request) -> ServerState:
    """Return the state of the server that a request came to."""
    state: ServerState = request.app.state.server
    return state
