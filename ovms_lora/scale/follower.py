"""LedgerFollower: does in one replica what the ledger says, from its start to its end.

Owns how a change is made here, and the wait for one that a request must not miss. A change that fails here is logged:
the replica goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException

from ovms_lora.core.errors import EngineError, OvmsLoraError, UnavailableError
from ovms_lora.scale.changes import Change, ChangeKind, ChangeLog, History
from ovms_lora.scale.ray_errors import RAY_ERRORS
from ovms_lora.server.state import ServerState

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
_BEHIND_SECONDS = 30.0


class LedgerFollower:
    """Keeps one server as the ledger says; `since` asks the ledger and may wait for long, `teach` tells it."""

    def __init__(
        self,
        server: ServerState,
        since: Callable[[int], Awaitable[History]],
        teach: Callable[[History], Awaitable[None]],
    ) -> None:
        self._server = server
        self._since = since
        self._teach = teach
        self._log = ChangeLog()
        self._caught_up = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    @property
    def history(self) -> History:
        """All changes that still count, as far as they are known here."""
        return self._log.since(0)

    async def start(self) -> None:
        """Make all changes up to now, then follow."""
        while not await self._follow(-1):
            await asyncio.sleep(_AGAIN_SECONDS)
        self._task = asyncio.create_task(self._go_on())

    def check(self) -> None:
        """Raise EngineError when it follows no more, for a reason that nobody foresaw."""
        if self._task and self._task.done():
            raise EngineError("the replica does not follow the ledger any more")

    async def stop(self) -> None:
        """Follow no more."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def reach(self, version: int) -> None:
        """Wait until all changes up to a version are made. Raises UnavailableError when that takes too long."""
        if version <= self._log.version:
            return
        try:
            async with asyncio.timeout(_BEHIND_SECONDS), self._caught_up:
                await self._caught_up.wait_for(lambda: version <= self._log.version)
        except TimeoutError as error:
            raise UnavailableError("this replica is behind the others") from error

    async def _go_on(self) -> None:
        while True:
            if not await self._follow(self._log.version):
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _follow(self, version: int) -> bool:
        """Ask once, and make what has changed since; False when the ledger does not answer or knows less."""
        try:
            history = await self._since(version)
            if history.version < self._log.version:  # it has started again, and not heard of us
                await self._teach(self.history)
                return False
        except RAY_ERRORS as error:
            log.warning("the ledger does not answer: %s", type(error).__name__)
            return False
        for number, change in history.changes:
            if number > self._log.version:
                await self._make(change)
        self._log.take(history)
        async with self._caught_up:
            self._caught_up.notify_all()
        return True

    async def _make(self, change: Change) -> None:
        try:
            if change.kind is ChangeKind.RELOAD:
                await self._server.lifecycle.reload()
            elif change.adapter:
                await self._server.adapters.load(change.adapter)
            else:
                await self._server.adapters.unload(change.alias)
        except (OvmsLoraError, HTTPException) as error:
            if change.kind is not ChangeKind.UNLOAD:  # most replicas may never have had it
                log.error("%s %s failed here: %s", change.kind, change.alias, error)
