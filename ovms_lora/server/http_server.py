"""The HTTP server of `serve`: uvicorn, bounded, that drains at a signal.

    first signal: probes say 503, running calls end, stop;  second signal: exit now

Owns the signals and the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import Literal, cast

import uvicorn
from starlette.types import ASGIApp

from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.server.app import build_app
from ovms_lora.server.connection import BoundedConnection
from ovms_lora.server.early_load import LoadModel
from ovms_lora.server.model_source import ModelSource
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.state import ServerState
from ovms_lora.server.watchdog import Watchdog

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5


def run(options: ServerOptions, source: ModelSource, load: LoadModel, listener: socket.socket, url: str) -> None:
    """Answer on a listening socket, whose address `url` is, until a signal comes.

    Raises what kept the last model from being loaded when none could be.
    """
    failures: list[OvmsLoraError] = []
    app = build_app(options, source, load, on_failure=failures.append)
    app.openapi()  # takes a moment, which now holds nobody up
    server = _Server(http_config(app, options), app.state.server, url, failures)
    try:
        server.run(sockets=[listener])
    finally:
        server.watchdog.stop()
    if failures:
        raise failures[0]


def http_config(app: ASGIApp, options: ServerOptions, *, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    """Return how uvicorn speaks HTTP for an application: only HTTP/1.1, bounded."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan=lifespan,
        server_header=False,
        http=cast("type[asyncio.Protocol]", partial(BoundedConnection, options.limits)),
        ws="none",
        # Only for what never ends: `limits` counts what has come.
        h11_max_incomplete_event_size=2 * options.limits.header_bytes,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal first drains: probes say 503 at once, running calls end, then it stops."""

    def __init__(self, config: uvicorn.Config, state: ServerState, url: str, failures: list[OvmsLoraError]) -> None:
        super().__init__(config)
        self._lifecycle = state.lifecycle
        self._registry = state.registry
        self._drain_seconds = state.options.limits.drain_seconds
        self._url = url
        self._failures = failures
        self._announced = False
        self.watchdog = Watchdog(state.options.limits.heartbeat_seconds)
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; exit at once on a second signal."""
        del frame
        if self._drain_until is not None:
            os._exit(128 + sig)
        self._drain_until = time.monotonic() + self._drain_seconds
        self._lifecycle.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; ten times a second."""
        self.watchdog.look(live=self._lifecycle.live)
        if self._lifecycle.started and not self._announced and not self._failures:
            self._announced = True
            names = ", ".join(served.name for served in self._registry.served) or "no model yet"
            with contextlib.suppress(OSError):  # a full disk behind stderr does not keep a server from serving
                print(f"ready: {self._url} serving {names}", file=sys.stderr, flush=True)
        return await super().on_tick(counter) or bool(self._failures) or await self._drained()

    async def _drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._lifecycle.active_calls == 0:
            return True
        if time.monotonic() < self._drain_until:
            return False
        log.warning("%d calls did not end in time and are aborted", self._lifecycle.active_calls)
        await self._lifecycle.stop()
        return True
