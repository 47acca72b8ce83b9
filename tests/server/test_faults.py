"""Clients that leave or read slowly, steps that fail, queues that are full, requests that take too long."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest

from ovms_lora.core.errors import EngineError
from ovms_lora.server.options import Limits, ServerOptions
from tests.fakes import FakeRunner
from tests.server.serving import FakeModels, Served, chunks_of, serving
from tests.server.wellness import well

pytestmark = pytest.mark.anyio


class Client:
    """An ASGI client that sends one request, may stop reading, and may leave."""

    def __init__(self, served: Served, path: str, **body: Any) -> None:
        self.received: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self._leaves = asyncio.Event()
        self._body = json.dumps(body).encode()
        self._sent = False
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        self.task = asyncio.create_task(served.app(self.scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.received.append(message)
        if message.get("body"):
            self.arrived.set()

    def leave(self) -> None:
        self._leaves.set()


def slow_runner(seconds: float, begun: threading.Event | None = None) -> FakeRunner:
    """Return a runner whose steps take their time; `begun` is set when the first one starts."""

    def before_step(_: object) -> None:
        if begun:
            begun.set()
        time.sleep(seconds)

    return FakeRunner(num_blocks=1024, before_step=before_step)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_sequence(stream: bool) -> None:
    begun = threading.Event()
    models = FakeModels(
        runner=lambda: slow_runner(0.005, begun),
        max_model_len=4000,
    )
    async with serving(models) as served, well(served):
        begun.clear()
        client = Client(served, "/v1/completions", model="m", prompt="hello", max_tokens=3000, stream=stream)
        if stream:
            await client.arrived.wait()
        await until(begun.is_set)
        runner = models.runners["m"]
        client.leave()
        await client.task
        steps = len(runner.steps)
        await served.settled()
        assert len(runner.steps) <= steps + 2
        assert models.engines[0].stats().kv_cache_usage == 0
        assert served.state.lifecycle.active_calls == 0
        if not stream:
            assert client.received[0]["status"] == 499


async def test_a_client_that_leaves_while_queued_is_forgotten() -> None:
    async with serving() as served, well(served):
        gate = served.models.runners["m"].gate
        gate.clear()
        client = Client(served, "/v3/completions", model="m", prompt="hello", max_tokens=5, stream=True)
        await until(lambda: served.state.lifecycle.active_calls == 1)
        client.leave()
        await client.task
        gate.set()
        await served.settled()
        assert served.state.lifecycle.active_calls == 0


async def test_a_slow_reader_is_dropped_and_the_others_go_on() -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(buffered_outputs=50))
    models = FakeModels(
        runner=lambda: slow_runner(0.002),
        max_model_len=4000,
    )
    async with serving(models, options=options) as served, well(served):
        client = Client(served, "/v1/completions", model="m", prompt="hello", max_tokens=3000, stream=True)
        await client.arrived.wait()
        client.reads.clear()
        async with asyncio.timeout(5):
            await client.task
        await served.settled()
        assert served.state.lifecycle.active_calls == 0
        assert client.received[-1]["more_body"]
        assert await served.text("/v1/completions", model="m", prompt="hello")


async def test_a_failure_before_the_first_token_has_a_status(served: Served) -> None:
    for stream in (False, True):
        served.models.runners["m"].fail_next = EngineError("the device has failed")
        response = await served.post("/v3/completions", model="m", prompt="hello", stream=stream)
        assert (response.status_code, response.json()) == (500, {"error": "the device has failed"})
    assert await served.text("/v3/completions", model="m", prompt="hello", max_tokens=2)


@pytest.mark.parametrize("path", ["/v3/completions", "/v1/completions"])
async def test_a_failure_in_mid_stream_is_an_event_and_the_end(path: str) -> None:
    def fail_later(_: Any) -> None:
        if len(runner.steps) == 5:
            runner.fail_next = EngineError("the device has failed")

    runner = FakeRunner(num_blocks=1024, before_step=fail_later)
    async with serving(FakeModels(runner=lambda: runner)) as served:
        response = await served.post(path, model="m", prompt="hello", stream=True, max_tokens=50)
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert "[DONE]" not in events
        assert len(events) > 1
        error = json.loads(events[-1])["error"]
        assert (error if path.startswith("/v3") else error["message"]) == "the device has failed"


async def test_a_full_queue_answers_429() -> None:
    async with serving(FakeModels(max_waiting=2)) as served, well(served):
        gate = served.models.runners["m"].gate
        gate.clear()
        body = {"model": "m", "prompt": "hello", "max_tokens": 2}
        tasks = [asyncio.create_task(served.post("/v1/completions", **body)) for _ in range(6)]
        await until(lambda: sum(task.done() for task in tasks) >= 2)
        gate.set()
        answers = [await task for task in tasks]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 2
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {answer.status_code for answer in answers} == {200, 429}
        assert served.state.lifecycle.active_calls == 0


async def test_a_call_of_several_prompts_is_refused_whole() -> None:
    async with serving(FakeModels(max_waiting=2)) as served, well(served):
        gate = served.models.runners["m"].gate
        gate.clear()
        response = await served.post("/v3/completions", model="m", prompt=["a"] * 8, max_tokens=2)
        assert response.status_code == 429
        gate.set()
        await served.settled()
        assert served.state.lifecycle.active_calls == 0


async def test_a_request_that_takes_too_long_answers_504() -> None:
    options = ServerOptions(poll_seconds=0, limits=Limits(request_seconds=0.05))
    models = FakeModels(runner=lambda: slow_runner(0.01))
    async with serving(models, options=options) as served:
        response = await served.post("/v3/completions", model="m", prompt="hello", ignore_eos=True)
        assert response.status_code == 504


async def test_an_unexpected_fault_is_a_500_without_details(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(served.models.engines[0]), "submit", lambda *_: 1 / 0)
    v3 = await served.post("/v3/completions", model="m", prompt="hello")
    assert (v3.status_code, v3.json()) == (500, {"error": "Internal server error"})
    v1 = await served.post("/v1/completions", model="m", prompt="hello")
    assert v1.json()["error"]["type"] == "InternalServerError"


async def test_sixteen_streams_at_once_are_each_their_own(served: Served) -> None:
    bodies = [{"model": "m", "prompt": f"prompt {i}", "temperature": 0, "max_tokens": 30} for i in range(16)]
    alone = [await served.text("/v3/completions", **body) for body in bodies]
    texts = await asyncio.gather(*(served.text("/v3/completions", **body, stream=True) for body in bodies))
    assert list(texts) == alone


async def test_chunks_are_whole_events(served: Served) -> None:
    response = await served.post("/v3/completions", model="m", prompt="hello", stream=True, max_tokens=4)
    assert len(chunks_of(response.text)) == 4


async def test_a_client_that_leaves_before_it_has_sent_all_is_no_fault(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"{", "more_body": True},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop()

    client = Client(served, "/v3/completions")
    client.leave()
    await client.task
    client.received.clear()
    await served.app({**client.scope}, receive, client._send)
    assert client.received[0]["status"] == 499
    assert not any(record.exc_info for record in caplog.records)
