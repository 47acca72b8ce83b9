"""OwnServer: the ingress on a port of its own: HTTP as `ovms-lora serve` speaks it, with no proxy of Serve's before it.

Owns the socket and the server in the ingress' process. Who is answered what is the application's business.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from ovms_lora.server.http_server import http_config
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.serve import bind

_STARTED_SECONDS = 0.01


class OwnServer:
    """An application on `options.host` and a port, in the event loop that opens it."""

    def __init__(self, app: ASGIApp, options: ServerOptions, port: int) -> None:
        self._options = options
        self._port = port
        self._server = _Server(http_config(app, options, lifespan="off"))
        self._serving: asyncio.Task[None] | None = None

    @property
    def answers(self) -> bool:
        """Whether it is open."""
        return self._serving is not None and not self._serving.done()

    async def open(self) -> None:
        """Listen from now on. Raises ConfigError when the port is taken."""
        listener = bind(self._options.host, self._port)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        while not (self._server.started or self._serving.done()):
            await asyncio.sleep(_STARTED_SECONDS)
        if self._serving.done():
            self._serving.result()

    async def close(self) -> None:
        """Take no more connections; return when those that are open have got what was sent, or after some seconds."""
        self._server.should_exit = True
        if self._serving:
            await self._serving


class _Server(uvicorn.Server):
    """uvicorn's server, in a process whose signals are Ray's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield
