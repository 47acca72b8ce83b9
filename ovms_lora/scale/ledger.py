"""Ledger: the one place through which adapters and configuration change in all replicas, one change after the other.

    client ──► Ingress ──► Ledger ──► one replica does it, and its answer is the client's
                             └──────► noted, and told to all replicas, also to those that start later

There is one ledger. Its replicas' copies survive it: when it starts again it takes the fullest that it is told of,
and later a fuller one of a replica that did not answer then.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from ovms_lora.scale.changes import Change, ChangeKind, ChangeLog, History, newest
from ovms_lora.scale.engines import Engines
from ovms_lora.scale.exchange import Forwarded
from ovms_lora.scale.ray_errors import RAY_ERRORS
from ovms_lora.server import logs
from ovms_lora.server.body import parse_object
from ovms_lora.server.lora_routes import unwanted_alias, wanted_adapter
from ovms_lora.server.options import ServerOptions

log = logging.getLogger(__name__)

_RECOVERY_SECONDS = 5.0
# How long a replica's question stays open when nothing changes.
_POLL_SECONDS = 30.0


class Ledger:
    """Serve makes it and calls its methods, all on one event loop."""

    async def __init__(self, options: ServerOptions, engines: DeploymentHandle[Any]) -> None:  # type: ignore[misc] # Serve awaits it
        logs.configure(options.log_level)
        self._engines = Engines(engines, options.limits)
        self._log = ChangeLog()
        self._changing = asyncio.Lock()
        self._told = asyncio.Condition()
        self._updates = set[asyncio.Task[tuple[list[Message], int]]]()
        with contextlib.suppress(TimeoutError, *RAY_ERRORS):  # the first start: nobody has a copy
            asked = engines.broadcast("history")
            copies = await asked.results_async(timeout_s=_RECOVERY_SECONDS, return_exceptions=True)
            self._log.take(newest(copy for copy in copies if isinstance(copy, History)))

    async def update(self, request: Forwarded, key: str) -> tuple[list[Message], int]:
        """Have one replica do what a request wants; return its answer, and the version of the ledger after it.

        `key` names adapters whose holders are asked first: not all replicas have what was found on a loading path. What
        has begun is done to its end and noted, also when nobody waits for it any more. Raises what `Engines.answer`
        raises.
        """
        # Without the context of this call, whose end Serve would pass on.
        task = asyncio.create_task(self._update(request, key), context=contextvars.Context())
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        return await asyncio.shield(task)

    async def learn(self, history: History) -> None:
        """Take what a replica knows and the ledger has lost."""
        async with self._changing:
            if history.version > self._log.version:
                log.warning("the ledger goes on from version %d, which a replica has kept", history.version)
                self._log.go_on_from(history)
                await self._tell()

    async def _update(self, request: Forwarded, key: str) -> tuple[list[Message], int]:
        async with self._changing:
            request = replace(request, version=self._log.version)
            messages = [message async for message in self._engines.answer(request, key)]
            if messages[0]["status"] < 300:
                self._log.add(_change(request))
                await self._tell()
            return messages, self._log.version

    async def _tell(self) -> None:
        async with self._told:
            self._told.notify_all()

    async def since(self, version: int) -> History:
        """Return what has changed after a version; wait a while for something."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_SECONDS), self._told:
                await self._told.wait_for(lambda: self._log.version != version)
        return self._log.since(version)


def _change(request: Forwarded) -> Change:
    path: str = request.scope["path"]
    if path.endswith("/reload"):
        return Change(ChangeKind.RELOAD)
    document = parse_object(request.body)
    if path.endswith("/unload_lora_adapter"):
        return Change(ChangeKind.UNLOAD, unwanted_alias(document))
    # Said again to the replica that has done it already, and to those that may have another of that name.
    adapter = replace(wanted_adapter(document), replace=True)
    return Change(ChangeKind.LOAD, adapter.alias, adapter)
