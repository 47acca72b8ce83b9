"""The bridge between the engine's thread and the event loop, by itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from ovms_lora.core.errors import DeadlineExceededError, EngineError, QueueFullError, UnavailableError
from ovms_lora.core.request import FinishReason, GenerationRequest, SequenceOutput
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.server.async_engine import AsyncEngine

pytestmark = pytest.mark.anyio


class Recorder:
    """Stands for an engine: notes what is submitted and cancelled."""

    def __init__(self, room: int = 100) -> None:
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self._room = room

    def submit(self, *requests: GenerationRequest) -> None:
        if len(requests) > self._room:
            raise QueueFullError("full")
        self.submitted += [request.request_id for request in requests]

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def bridge(engine: Recorder, *, buffered_outputs: int = 100) -> AsyncEngine:
    bridge = AsyncEngine(asyncio.get_running_loop(), buffered_outputs=buffered_outputs)
    bridge.attach(cast("Any", engine))
    return bridge


def request(name: str, n: int = 1) -> GenerationRequest:
    return GenerationRequest(name, (1,), SamplingParams(n=n))


def output(name: str, text: str = "", **fields: Any) -> SequenceOutput:
    return SequenceOutput(name, fields.pop("index", 0), text=text, **fields)


async def test_outputs_of_another_thread_arrive_in_order() -> None:
    engine = Recorder()
    both = bridge(engine)
    streams = [both.open([request(name)]) for name in "ab"]

    def steps() -> None:
        for number in range(50):
            both.deliver([output("a", f"{number} "), output("b", f"{-number} ")])
        both.deliver([output(name, finish_reason=FinishReason.STOP) for name in "ab"])

    thread = threading.Thread(target=steps)
    thread.start()
    texts = ["".join([o.text for outputs in [o async for o in stream] for o in outputs]) for stream in streams]
    thread.join()
    assert texts == ["".join(f"{sign * n} " for n in range(50)) for sign in (1, -1)]
    for stream in streams:
        stream.close()
    assert both.active_calls == 0
    assert engine.cancelled == []


async def test_a_step_wakes_the_loop_once() -> None:
    calls = 0

    class Loop:
        def call_soon_threadsafe(self, *_: Any) -> None:
            nonlocal calls
            calls += 1

    both = AsyncEngine(cast("Any", Loop()), buffered_outputs=1)
    both.deliver([output("a"), output("b"), output("c")])
    assert calls == 1


async def test_all_sequences_end_before_the_stream_does() -> None:
    both = bridge(Recorder())
    stream = both.open([request("a", n=2), request("b")])
    both.deliver([output("a", index=1, finish_reason=FinishReason.STOP), output("b", finish_reason=FinishReason.STOP)])
    assert len(await anext(stream)) == 2
    both.deliver([output("a", "x"), output("a", finish_reason=FinishReason.LENGTH)])
    assert [o.text for o in await anext(stream)] == ["x", ""]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_closing_early_cancels_once() -> None:
    engine = Recorder()
    both = bridge(engine)
    stream = both.open([request("a"), request("b")])
    stream.close()
    stream.close()
    assert engine.cancelled == ["a", "b"]
    assert both.active_calls == 0
    both.deliver([output("a", "late")])
    await asyncio.sleep(0)


async def test_a_call_counts_while_it_is_prepared() -> None:
    both = bridge(Recorder())
    with both.preparing():
        stream = both.open([request("a")])
    assert both.active_calls == 1
    stream.close()
    with pytest.raises(ValueError, match="bad"), both.preparing():
        raise ValueError("bad")
    assert both.active_calls == 0


async def test_a_refused_call_leaves_nothing() -> None:
    engine = Recorder(room=1)
    both = bridge(engine)
    with pytest.raises(QueueFullError):
        both.open([request("a"), request("b")])
    assert (engine.submitted, engine.cancelled, both.active_calls) == ([], [], 0)


async def test_what_came_before_an_error_is_delivered_first() -> None:
    engine = Recorder()
    both = bridge(engine)
    stream = both.open([request("a")])
    both.deliver([output("a", "x"), output("a", error=EngineError("failed"))])
    assert [o.text for o in await anext(stream)] == ["x"]
    with pytest.raises(EngineError):
        await anext(stream)
    assert both.active_calls == 0


async def test_an_error_of_one_prompt_ends_the_call() -> None:
    engine = Recorder()
    both = bridge(engine)
    stream = both.open([request("a"), request("b")])
    both.deliver([output("a", error=EngineError("failed"))])
    with pytest.raises(EngineError):
        await stream.ready()
    assert "b" in engine.cancelled


async def test_an_abort_is_an_error() -> None:
    both = bridge(Recorder())
    stream = both.open([request("a")])
    both.deliver([output("a", finish_reason=FinishReason.ABORT)])
    with pytest.raises(UnavailableError):
        await anext(stream)


async def test_who_reads_too_slowly_is_dropped() -> None:
    engine = Recorder()
    both = bridge(engine, buffered_outputs=3)
    slow, quick = both.open([request("a")]), both.open([request("b")])
    for _ in range(4):
        both.deliver([output("a", "x"), output("b", "y")])
        await anext(quick)
    assert slow.overrun.is_set()
    assert not quick.overrun.is_set()
    assert engine.cancelled == ["a"]
    assert len(await anext(slow)) == 3
    with pytest.raises(DeadlineExceededError):
        await anext(slow)
