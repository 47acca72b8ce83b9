"""Overload: clients that ask far more often than the server can answer, each on time, whatever happened to the others.

    saturation   as many clients as it takes, each asking again when it is answered: what the server can do
    overload     an open loop at a multiple of that; what is refused, how fast, and what the accepted ones get
    recovery     how long after the end a request is answered again as it is when it is alone

python -m bench.overload --url http://127.0.0.1:8000 --model base_model [--seconds 60] [--factor 10]

Speaks HTTP only, to any server: its own numbers are in `Report`. The client shares the machine with the server, so how
late the client itself is stands beside: a time in the report is the server's only as far as it exceeds that.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvloop

from bench.keep_alive import KeepAlive
from bench.rounds import quantile

_USUAL = 1.5  # a request that takes no longer than this many times its time alone is answered as usual
_PATIENCE = 30.0
_TICK = 0.005


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its status (0: no answer), whether it says when to come again, how long it took, when it ended."""

    status: int
    retry_after: bool
    seconds: float
    ended: float


@dataclass(frozen=True, slots=True)
class Report:
    """What an overload did; rates are answers per second, times are seconds."""

    saturation: float
    offered: float
    accepted: int
    refused: int
    failed: int
    goodput: float
    refusal_p50: float
    refusal_p99: float
    without_retry_after: int
    accepted_p99: float
    recovery: float
    client_lag_p50: float
    client_lag_p99: float


Ask = Callable[[], Coroutine[Any, Any, Asked]]


def asker(client: KeepAlive, path: str, body: Mapping[str, Any], key: str | None = None) -> Ask:
    """Return what asks once."""

    async def ask() -> Asked:
        begun = time.perf_counter()
        answer = await client.post(path, body, key)
        ended = time.perf_counter()
        return Asked(answer.status, b"retry-after:" in answer.headers, ended - begun, ended)

    return ask


class ClientLag:
    """How late this client's own event loop is, looked at all the time; use it in `with`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __enter__(self) -> ClientLag:
        self._task = asyncio.create_task(self._look())
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()

    async def _look(self) -> None:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            self.seconds.append(time.perf_counter() - due)


async def saturation(ask: Ask, *, clients: int, seconds: float) -> float:
    """Return the answers per second of so many clients that each wait for their answer."""
    end = time.perf_counter() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() < end:
            good = (await ask()).status == 200
            answered += good and time.perf_counter() < end

    await asyncio.gather(*(client() for _ in range(clients)))
    return answered / seconds


async def open_loop(ask: Ask, *, rate: float, seconds: float) -> list[asyncio.Task[Asked]]:
    """Ask at a fixed rate, without waiting for answers; return when the last one is sent."""
    begun = time.perf_counter()
    tasks: list[asyncio.Task[Asked]] = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(ask()))
    return tasks


async def recovery(ask: Ask, alone: float) -> float:
    """Return the seconds until a request is answered as usual."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < _PATIENCE:
        asked = await ask()
        if asked.status == 200 and asked.seconds <= alone * _USUAL:
            break
        await asyncio.sleep(0.05)
    return time.perf_counter() - begun


async def measure(ask: Ask, *, clients: int, factor: float, seconds: float) -> Report:
    """Measure saturation, then overload it."""
    alone = statistics.median([(await ask()).seconds for _ in range(5)])
    capacity = await saturation(ask, clients=clients, seconds=max(2.0, seconds / 4))
    begun = time.perf_counter()
    with ClientLag() as lag:
        tasks = await open_loop(ask, rate=factor * capacity, seconds=seconds)
    overloaded = time.perf_counter()
    recovered = await recovery(ask, alone)
    asked = await asyncio.gather(*tasks)
    within = sum(one.status == 200 and one.ended <= overloaded for one in asked)
    accepted = [one.seconds for one in asked if one.status == 200]
    refused = [one for one in asked if one.status == 429]
    return Report(
        saturation=capacity,
        offered=factor * capacity,
        accepted=len(accepted),
        refused=len(refused),
        failed=len(asked) - len(accepted) - len(refused),
        goodput=within / (overloaded - begun),
        refusal_p50=quantile([one.seconds for one in refused], 0.5),
        refusal_p99=quantile([one.seconds for one in refused], 0.99),
        without_retry_after=sum(not one.retry_after for one in refused),
        accepted_p99=quantile(accepted, 0.99),
        recovery=recovered,
        client_lag_p50=quantile(lag.seconds, 0.5),
        client_lag_p99=quantile(lag.seconds, 0.99),
    )


async def _run(options: argparse.Namespace) -> Report:
    body = {"model": options.model, "prompt": "hello", "max_tokens": options.tokens, "ignore_eos": True}
    address = urlsplit(options.url)
    async with KeepAlive(address.hostname or "127.0.0.1", address.port or 80) as client:
        ask = asker(client, "/v1/completions", body, options.key)
        return await measure(ask, clients=options.clients, factor=options.factor, seconds=options.seconds)


def main() -> None:
    """Overload a server that runs; print the report as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", help="API key")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--clients", type=int, default=32, help="that saturate it")
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    print(json.dumps(dataclasses.asdict(uvloop.run(_run(parser.parse_args()))), indent=1))


if __name__ == "__main__":
    main()
