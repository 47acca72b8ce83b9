"""After any fault the server is as well as before: same texts, nothing held, answers that give nothing away."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import EngineError
from ovms_lora.engine.device import device_error
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.server.options import Limits, ServerOptions
from tests.adapters.adapter_files import write_adapter
from tests.adapters.fuzzing import corpus
from tests.fakes import FakeRunner
from tests.server.serving import FakeModels, Served, serving, write_lora_config
from tests.server.test_faults import Client, until
from tests.server.wellness import well

pytestmark = pytest.mark.anyio

V3, V1 = "/v3/completions", "/v1/completions"


class Faults:
    """What befalls the steps of a runner."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.error: BaseException | None = None
        self.prompt = b""
        self.adapter = ""

    def __call__(self, chunks: Sequence[Chunk]) -> None:
        time.sleep(self.seconds)
        if self.error and any(self._hits(chunk) for chunk in chunks):
            raise self.error

    def _hits(self, chunk: Chunk) -> bool:
        request = chunk.sequence.request
        digests = {use.digest for use in request.adapters}
        return self.adapter in digests if self.adapter else bytes(request.prompt_token_ids).startswith(self.prompt)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
async def lora(faults: Faults, tmp_path: Path) -> AsyncIterator[Served]:
    models = FakeModels(
        runner=lambda: FakeRunner(num_blocks=64, before_step=faults), options=EngineOptions(max_num_batched_tokens=16)
    )
    options = ServerOptions(poll_seconds=0, runtime_lora_updating=True, lora_path_prefixes=(tmp_path,))
    async with serving(models, source=write_lora_config(tmp_path), options=options) as served:
        yield served


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **more}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
async def test_a_client_that_leaves(lora: Served, faults: Faults, state: str, stream: bool) -> None:
    async with well(lora, "base", "sql"):
        faults.seconds = 0.02
        runner = lora.models.runners["base"]
        before = len(runner.steps)
        prompt = "x" * 100 if state == "prefill" else "hello"
        others = [Client(lora, V3, **body(f"other {i}")) for i in range(16 if state == "queued" else 0)]
        client = Client(lora, V3, **body(prompt, model="sql", stream=stream))
        steps = 3 if state == "prefill" else 10
        await until(lambda: len(runner.steps) >= before + (1 if state == "queued" else steps))
        client.leave()
        await client.task
        for other in others:
            other.leave()
            await other.task
        left = len(runner.steps)
        await lora.settled()
        assert len(runner.steps) <= left + 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [V3, V1])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineError("the device failed in a step"), 500),
        (device_error(RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:79"), "a step"), 500),
        (device_error(RuntimeError("std::bad_alloc"), "a step"), 503),
        (device_error(RuntimeError("[GPU] out of GPU memory\n 0x7f001234"), "a step"), 503),
        (device_error(MemoryError(), "a step"), 503),
    ],
)
async def test_a_device_that_refuses(
    lora: Served, faults: Faults, path: str, stream: bool, error: EngineError, status: int
) -> None:
    async with well(lora, "base", "sql", "tools", "mix") as check:
        faults.error, faults.prompt = error, b"bad"
        others = [asyncio.create_task(lora.text(path, **body(f"good {i}", model="tools"))) for i in range(3)]
        answer = await check.refused(status, path, **body("bad", model="sql", stream=stream))
        assert error.message in answer
        assert [len(await other) > 0 for other in others] == [True] * 3


async def test_an_adapter_that_makes_steps_fail_fails_alone(lora: Served, faults: Faults) -> None:
    registry = lora.state.registry
    runtime = next(served.model.lora for served in registry.served if served.model.lora)
    async with well(lora, "base", "tools", "sql"):
        alone = [await lora.text(V3, **body(f"p{i}", model=model)) for i, model in enumerate(("base", "tools"))]
        faults.error, faults.adapter = EngineError("the device failed"), runtime.store.registered["sql"].digest
        models = ["base", "tools", "sql", "sql", "mix"]
        answers = await asyncio.gather(*(lora.post(V3, **body(f"p{i}", model=m)) for i, m in enumerate(models)))
        assert [answer.status_code for answer in answers] == [200, 200, 500, 500, 500]
        assert [answer.json()["choices"][0]["text"] for answer in answers[:2]] == alone
        faults.error = None


async def test_a_cache_that_is_too_small_for_all_changes_no_text(lora: Served) -> None:
    async with well(lora, "base", "sql"):
        bodies = [body(f"prompt number {i}", model=("base", "sql")[i % 2], max_tokens=100) for i in range(8)]
        alone = [await lora.text(V3, **each) for each in bodies]
        together = await asyncio.gather(*(lora.text(V3, **each) for each in bodies))
        assert list(together) == alone
        assert sum(engine.stats().preemptions for engine in lora.models.engines) > 0


async def test_a_fault_of_ours_has_an_id_and_one_record(lora: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = type(lora.models.engines[0])
    async with well(lora, "base", "sql") as check:
        for error, status in ((ZeroDivisionError("/usr/lib/secret.py"), 500), (MemoryError(), 503)):

            def fails(*_: object, error: Exception = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(engine, "check", fails)
                await check.refused(status, V3, **body("hello"))
                await check.refused(status, V1, **body("hello", stream=True))
        assert sum("ZeroDivisionError" in line for line in check.lines) == 2


async def test_bad_requests_and_bad_adapters(lora: Served, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bad", weights=b"\x80\x04N.")
    async with well(lora, "base", "sql") as check:
        await check.refused(400, V3, **body("hello", max_tokens=-1))
        await check.refused(404, V1, **body("hello", model="nobody"))
        await check.refused(422, "/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
        await check.refused(403, "/v1/load_lora_adapter", lora_name="bad", lora_path="/etc")
        response = await lora.client.post(V3, content=b"{" * 1000)
        assert response.status_code == 412


async def test_hostile_adapters_while_others_are_served(lora: Served, faults: Faults, tmp_path: Path) -> None:
    hostile = {name: folder for name, folder in corpus().items() if name.startswith("bad")}
    for name, folder in hostile.items():
        (tmp_path / name).mkdir()
        for file, data in folder.items():
            (tmp_path / name / file).write_bytes(data)
    async with well(lora, "base", "sql", "tools") as check:
        faults.seconds = 0.002
        streams = [asyncio.create_task(lora.text(V1, **body(f"{i}", model="sql", max_tokens=200))) for i in range(4)]
        for name in hostile:
            load = {"lora_name": name, "lora_path": str(tmp_path / name)}
            await check.refused(422, "/v1/load_lora_adapter", **load)
        assert all(await asyncio.gather(*streams))
        faults.seconds = 0
        served = {card["id"] for card in (await lora.client.get("/v1/models")).json()["data"]}
        assert not served & hostile.keys()


async def test_a_wall_clock_that_jumps_decides_nothing(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = FakeModels(runner=lambda: FakeRunner(num_blocks=64, before_step=faults))
    options = ServerOptions(poll_seconds=0, limits=Limits(request_seconds=2.0))
    source, jumps = write_lora_config(tmp_path), itertools.cycle([4e9, 0.0, 1e9])
    async with serving(models, source=source, options=options) as served, well(served, "base", "sql"):
        monkeypatch.setattr(time, "time", lambda: next(jumps))
        monkeypatch.setattr(time, "time_ns", lambda: int(next(jumps) * 1e9))
        assert len(await served.text(V3, **body("hello", model="sql"))) > 0
        faults.seconds = 0.2
        begun = time.monotonic()
        assert (await served.post(V3, **body("late"))).status_code == 504
        assert 1.5 < time.monotonic() - begun < 4
        faults.seconds = 0.0
        monkeypatch.undo()
