"""Workers: threads for what would hold the event loop up: parsing, templates, tokenising, grammars, adapter files.

Owns the pools and the bound between what is worth a thread and what is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_INLINE_BYTES = 4096
# They wait for files and locks rather than compute; so many cold adapters may load before a warm one has to wait.
_BLOCKING_THREADS = 32


class Workers:
    """A small pool of threads that compute, some for what strangers wrote, and a larger pool of threads that wait."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        # One hostile grammar may take seconds: others wait for it, but nobody who sends none does.
        self._grammars = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        # An adapter's own chat template can be anybody's, too.
        self._templates = ThreadPoolExecutor(threads, thread_name_prefix="templates")
        self._blocking = ThreadPoolExecutor(_BLOCKING_THREADS, thread_name_prefix="adapters")

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`: in a thread, or right here when `size` bytes of input are quicker than the way there."""
        if size <= _INLINE_BYTES:
            return work(*args, **kwargs)
        return await self.compute(work, *args, **kwargs)

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args, **kwargs))

    async def compile(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`, which compiles what a client sent, in the thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._grammars, partial(work, *args, **kwargs))

    async def render(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`, which renders an adapter's own chat template, in a thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._templates, partial(work, *args, **kwargs))

    async def block(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`, which may wait for files or locks, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._blocking, partial(work, *args, **kwargs))

    def stop(self) -> None:
        """End the threads; what waits is dropped."""
        for pool in (self._pool, self._grammars, self._templates, self._blocking):
            pool.shutdown(wait=False, cancel_futures=True)
