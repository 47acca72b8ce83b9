"""More than the server can do: excess is refused at once, what is accepted is served, and a flood stays with its owner.

The device is a fake one whose steps take a fixed time, so capacity is known: requests of 4 tokens, 4 at a time.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from bench.keep_alive import KeepAlive
from bench.overload import Ask, asker, measure, open_loop
from bench.rounds import quantile
from ovms_lora.core.config import EngineOptions
from ovms_lora.server.keys import ApiKey, digest_of
from ovms_lora.server.options import Limits, ServerOptions
from ovms_lora.server.tenants import Tenant
from tests.fakes import FakeRunner
from tests.server.process import one_model
from tests.server.raw import listening
from tests.server.serving import FakeModels, write_lora_config

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
STEP = 0.04
KEYS = tuple(ApiKey(digest_of(name), Tenant(name, None, 0.5)) for name in ("flood", "calm"))


def models() -> FakeModels:
    """Return models of 25 requests a second: 4 tokens each, 4 at a time, 0.04 s a step."""
    return FakeModels(
        options=EngineOptions(max_num_seqs=4, max_num_batched_tokens=64),
        runner=lambda: FakeRunner(num_blocks=1024, before_step=lambda _: time.sleep(STEP)),
    )


def connected(port: int) -> KeepAlive:
    return KeepAlive("127.0.0.1", port, seconds=30)


def ask_of(client: KeepAlive, key: str | None = None, **body: Any) -> Ask:
    body = {"model": "m", "prompt": "hi", "max_tokens": 4, "ignore_eos": True, **body}
    return asker(client, PATH, body, key)


async def test_ten_times_the_capacity() -> None:
    flags = ("--limit", "waiting_requests=32", "--limit", "request_seconds=8")
    with one_model(*flags, STEP_SECONDS="0.08", MAX_NUM_SEQS="4") as process:
        body = {"model": "m", "prompt": "hi", "max_tokens": 4, "ignore_eos": True}
        async with connected(int(process.url.rsplit(":", 1)[1])) as client:
            report = await measure(asker(client, PATH, body), clients=16, factor=10, seconds=4)
    assert report.failed == report.without_retry_after == 0
    assert report.refused > report.accepted > 0
    assert report.refusal_p50 < 0.05
    assert report.goodput >= 0.9 * report.saturation
    assert report.accepted_p99 < 8
    assert report.recovery <= 5


async def p99_under(flood: Ask, calm: Ask, *, rate: float) -> tuple[float, float]:
    """Return the other one's p99 alone, and while the flood goes on."""

    async def asked() -> float:
        times = []
        for _ in range(12):
            one = await calm()
            assert one.status == 200
            times.append(one.seconds)
        return quantile(times, 0.99)

    alone = await asked()
    flooding = asyncio.create_task(open_loop(flood, rate=rate, seconds=5))
    await asyncio.sleep(1)
    beside = await asked()
    await asyncio.gather(*await flooding)
    return alone, beside


async def test_a_flooding_tenant_leaves_the_other_its_latency() -> None:
    options = ServerOptions(poll_seconds=0, api_keys=KEYS, limits=Limits(waiting_requests=64))
    async with listening(models(), options=options) as server, connected(server.port) as client:
        flood, calm = (ask_of(client, key) for key in ("flood", "calm"))
        alone, beside = await p99_under(flood, calm, rate=100)
    assert beside <= 3 * alone


async def test_a_flooding_adapter_leaves_the_other_its_latency(tmp_path: Path) -> None:
    limits = Limits(waiting_requests=256)
    source = write_lora_config(tmp_path)
    async with listening(models(), limits=limits, source=source) as server, connected(server.port) as client:
        flood, calm = (ask_of(client, model=alias) for alias in ("sql", "tools"))
        alone, beside = await p99_under(flood, calm, rate=60)
    assert beside <= 3 * alone
