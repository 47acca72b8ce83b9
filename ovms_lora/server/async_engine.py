"""AsyncEngine: the bridge between the engine's thread and the event loop.

The engine thread hands over the outputs of a step with one wake-up of the loop; here they are sorted into the streams
of the calls that wait for them. A stream holds a bounded number of outputs: who reads too slowly is dropped, the batch
never waits. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ovms_lora.core.errors import DeadlineExceededError, OvmsLoraError, UnavailableError
from ovms_lora.core.request import FinishReason, GenerationRequest, SequenceOutput

if TYPE_CHECKING:
    from ovms_lora.engine.engine import Engine


class OutputStream:
    """The outputs of one call, which is one or several engine requests, for a single reader.

    Iterate over it for lists of outputs; close it whatever happens.
    """

    def __init__(self, sequences: int, *, limit: int, close: Callable[[bool], None]) -> None:
        self.overrun = asyncio.Event()
        self._open = sequences
        self._limit = limit
        self._close = close
        self._pending: list[SequenceOutput] = []
        self._error: OvmsLoraError | None = None
        self._wake = asyncio.Event()

    async def ready(self) -> None:
        """Wait until there is an output; raise the error if the call has failed before its first one."""
        await self._wake.wait()
        if self._error and not self._pending:
            raise self._error

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        if not self._pending and not self._error and self._open == 0:
            raise StopAsyncIteration
        await self.ready()
        outputs, self._pending = self._pending, []
        if not self._error and self._open > 0:
            self._wake.clear()
        return outputs

    def put(self, output: SequenceOutput) -> None:
        """Take one output; on the event loop."""
        if self._error:
            return
        if output.error or output.finish_reason is FinishReason.ABORT:
            self._fail(output.error or UnavailableError("the request was aborted"))
            return
        if len(self._pending) >= self._limit:
            self._fail(DeadlineExceededError("the client reads too slowly"))
            self.overrun.set()
            return
        self._pending.append(output)
        self._open -= output.finished
        self._wake.set()

    def close(self) -> None:
        """Cancel what still runs; no output follows. Closing twice does nothing."""
        self._close(self._open > 0)

    def _fail(self, error: OvmsLoraError) -> None:
        self._error = error
        self._wake.set()
        self.close()


class AsyncEngine:
    """One engine as the event loop sees it. `deliver` is what the engine gets; `attach` gives the engine back."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, buffered_outputs: int) -> None:
        self._loop = loop
        self._limit = buffered_outputs
        self._engine: Engine | None = None
        self._streams: dict[str, OutputStream] = {}
        self._calls = 0

    def attach(self, engine: Engine) -> None:
        """Name the engine behind this bridge, before the first call."""
        self._engine = engine

    @property
    def active_calls(self) -> int:
        """How many calls are prepared, or neither answered nor dropped."""
        return self._calls

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count a call that has chosen this engine and is not opened yet, so that the engine waits for it, too."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        """Take the outputs of one step; on the engine thread."""
        self._loop.call_soon_threadsafe(self._dispatch, tuple(outputs))

    def open(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        """Submit the requests of one call; on the event loop. Raises what `Engine.submit` raises."""
        engine = self._engine
        assert engine is not None, "attach the engine before the first call"
        ids = [request.request_id for request in requests]
        sequences = sum(request.sampling.n for request in requests)
        stream = OutputStream(
            sequences,
            limit=self._limit * sequences,
            close=lambda unfinished: self._release(engine if unfinished else None, ids),
        )
        engine.submit(*requests)
        # Not too late: outputs are sorted on the event loop, where this runs.
        self._calls += 1
        self._streams.update(dict.fromkeys(ids, stream))
        return stream

    def _release(self, cancel_at: Engine | None, ids: list[str]) -> None:
        """Forget a call, once."""
        if not ids:
            return
        self._calls -= 1
        for request_id in ids:
            if self._streams.pop(request_id, None) and cancel_at:
                cancel_at.cancel(request_id)
        ids.clear()

    def _dispatch(self, outputs: Sequence[SequenceOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream:
                stream.put(output)
