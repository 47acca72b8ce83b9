"""Working for a client only as long as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has left, or reads so slowly that it is treated as if it had."""


async def unless_gone(receive: Receive, overrun: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Await `work` and return its result; cancel it and raise ClientGoneError when the client leaves first.

    The body must have been received. `overrun` set counts as leaving.
    """
    tasks = (asyncio.create_task(work), asyncio.create_task(_gone(receive)), asyncio.create_task(overrun.wait()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
