"""EngineReplica: a whole server, as `ovms-lora serve` puts it together, without a socket: Serve brings the requests.

Owns its life as a Serve replica: it is there once its models are loaded, healthy while its engines turn, and says what
it holds. Which request comes here is the router's business, and what changes in all replicas the ledger's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.types import ASGIApp, Message

from ovms_lora.core.errors import EngineError, OvmsLoraError, UnavailableError
from ovms_lora.engine.model import load_model, read_options
from ovms_lora.scale.changes import History
from ovms_lora.scale.config import LEDGER
from ovms_lora.scale.exchange import Exchange, Forwarded
from ovms_lora.scale.follower import LedgerFollower
from ovms_lora.scale.holdings import Report
from ovms_lora.server import logs
from ovms_lora.server.app import build_app
from ovms_lora.server.errors import error_style
from ovms_lora.server.model_source import ModelSource
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.serve import share_interpreter
from ovms_lora.server.state import ServerState

if TYPE_CHECKING:
    from ovms_lora.engine.model import LoadedModel

log = logging.getLogger(__name__)

_START_SECONDS = 0.05


class EngineReplica:
    """One replica; Serve makes it and calls its methods, all on one event loop."""

    async def __init__(self, options: ServerOptions, source: ModelSource, threads: int) -> None:  # type: ignore[misc] # Serve awaits it
        logs.configure(options.log_level)
        share_interpreter()
        self._life = contextlib.AsyncExitStack()
        self._follower: LedgerFollower | None = None
        self._failures: list[OvmsLoraError] = []
        self._app = build_app(options, source, partial(load_on_share, threads), on_failure=self._failures.append)
        self._server: ServerState = self._app.state.server
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        while not (self._server.lifecycle.started or self._failures):
            await asyncio.sleep(_START_SECONDS)
        self.check_health()
        ledger = serve.get_deployment_handle(LEDGER)
        self._follower = LedgerFollower(self._server, ledger.since.remote, ledger.learn.remote)
        self._life.push_async_callback(self._follower.stop)
        await self._follower.start()

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message]]:
        """Yield the answer to a request, as it comes; the first list is empty and says that the request is taken."""
        yield []
        app: ASGIApp = self._app
        assert self._follower, "there are no requests before the start is over"
        try:
            await self._follower.reach(request.version)
        except UnavailableError as error:
            app = error_style(request.scope["path"]).response(error)
        async with contextlib.aclosing(Exchange(app, request).messages()) as batches:
            async for batch in batches:
                yield batch

    def check_health(self) -> None:
        """Raise what keeps the replica from working; Serve then replaces it."""
        if self._failures:
            raise self._failures[0]
        if not self._server.lifecycle.live:
            raise EngineError("an engine has not turned its loop lately")
        if self._follower:
            self._follower.check()

    def record_routing_stats(self) -> dict[str, Any]:
        """Return what the router is told."""
        served = self._server.registry.served
        adapters = {alias for model in served if (lora := model.model.lora) for alias in lora.resident}
        at_work = (*self._server.metrics.lora.running.copy().items(), *self._server.metrics.lora.waiting.copy().items())
        adapters.update(label for (_, label), count in at_work if count > 0)
        return Report(frozenset(adapters), frozenset(model.name for model in served)).as_stats()

    def history(self) -> History:
        """Return what clients have changed here, for a ledger that has lost it."""
        return self._follower.history if self._follower else History(0)

    async def metrics(self) -> tuple[str, bytes]:
        """Return the metrics of this replica alone, with its name."""
        return serve.get_replica_context().replica_id.unique_id, await self._server.workers.block(
            self._server.metrics.exposition
        )

    async def __del__(self) -> None:
        """Stop what has started, also when not all of it has; Serve has waited for running requests."""
        await self._life.aclose()


def load_on_share(
    threads: int,
    folder: Path,
    *,
    graph_path: str | None,
    device: str | None,
    plugin_config: dict[str, Any],
    **others: Any,
) -> LoadedModel:
    """Load a model to run on the replica's share of the processors, unless its configuration says otherwise.

    OpenVINO's CPU device binds its threads to processors, counting from the first one in every process: replicas of one
    machine would share it and leave the others idle.
    """
    _, options = read_options(folder, graph_path)
    share = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    own = share if (device or options.device) == "CPU" else {}
    properties = {**own, **options.plugin_config, **plugin_config}
    return load_model(folder, graph_path=graph_path, device=device, plugin_config=properties, **others)
