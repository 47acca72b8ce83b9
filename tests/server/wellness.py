"""The one check after every fault: the server is as well as it was before, and its answers gave nothing away."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import httpx

from ovms_lora.server.logs import _Formatter
from tests.server.process import Process
from tests.server.serving import Served

_SECONDS = 10.0
_POOL_THREADS = 4
_LEAKS = re.compile(r"/(?:work|home|usr|tmp|root|src|proc)/|src/|\.(?:py|cpp|so)\b|0x[0-9a-fA-F]{4,}|Traceback|File \"")


@dataclass(frozen=True)
class Footprint:
    """What a process holds of the system."""

    threads: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        return cls(len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd")))  # noqa: PTH208

    @classmethod
    def check(cls, pid: int, before: Footprint) -> None:
        """Wait until the process holds no more than before; a pool may have started a thread that it had not needed."""
        until = time.monotonic() + _SECONDS
        while True:
            now = cls.of(pid)
            if now.threads <= before.threads + _POOL_THREADS and now.descriptors <= before.descriptors:
                return
            assert time.monotonic() < until, (before, now)
            time.sleep(0.02)


def check_clean(answer: str) -> None:
    """An error names no path, address or line of code."""
    leak = _LEAKS.search(answer)
    assert leak is None, f"{leak[0]!r} in {answer!r}"


def check_logged_once(lines: Iterable[str], request_id: str) -> None:
    told = [line for line in lines if f"[{request_id}]" in line]
    assert len(told) == 1, told


def canaries(models: Iterable[str]) -> list[dict[str, Any]]:
    """Greedy requests whose texts depend on all that they read back."""
    return [
        {"model": model, "prompt": f"the canary of {model}", "temperature": 0, "max_tokens": 24} for model in models
    ]


class WellServed:
    """A server in this process, with the log lines of it since the check began."""

    def __init__(self, served: Served, models: tuple[str, ...]) -> None:
        self._served = served
        self._bodies = canaries(models)
        self._texts: list[str] = []
        self._before = Footprint(0, 0)
        self.lines: list[str] = []

    async def begin(self) -> None:
        await self._ask()  # starts what is started once
        self._texts, self._before = await self._ask(), Footprint.of(os.getpid())

    async def check(self) -> None:
        served = self._served
        await served.settled()
        for probe in ("live", "ready"):
            assert (await served.client.get(f"/v2/health/{probe}")).status_code == 200
        assert await self._ask() == self._texts
        assert served.state.lifecycle.active_calls == 0
        for engine in served.models.engines:
            pool, residency = engine._pool, engine._scheduler._residency
            assert pool.num_free == pool.num_blocks
            assert not any(pool.references(block) for block in range(pool.num_blocks))
            assert not getattr(residency, "_held", None)
            assert not engine._live._live
            assert not engine._inbox._ids
        Footprint.check(os.getpid(), self._before)

    async def refused(self, status: int, path: str, **body: Any) -> str:
        """Ask for something that fails; return the answer, which is clean and logged once."""
        name = f"refused-{len(self.lines)}"
        response = await self._served.client.post(path, json=body, headers={"X-Request-Id": name})
        assert response.status_code == status, response.text
        assert response.headers["X-Request-Id"] == name
        check_clean(response.text)
        check_logged_once(self.lines, name)
        return response.text

    async def _ask(self) -> list[str]:
        texts = [await self._served.text("/v1/completions", **body) for body in self._bodies]
        await self._served.settled()
        return texts


@contextlib.asynccontextmanager
async def well(served: Served, *models: str) -> AsyncIterator[WellServed]:
    """Check at the end that the server is as it was at the beginning; `models` are what the canaries ask."""
    check = WellServed(served, models or ("m",))
    await check.begin()
    with _formatted(check.lines):
        yield check
        await check.check()


@contextlib.contextmanager
def _formatted(lines: list[str]) -> Iterator[None]:
    """Collect the log as it would be written."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, root = Collector(), logging.getLogger("ovms_lora")
    handler.setFormatter(_Formatter())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class WellProcess:
    """A server in a process of its own: the check from outside. As a context manager it begins and checks."""

    def __init__(self, process: Process, *models: str) -> None:
        self._process = process
        self._bodies = canaries(models or ("m",))
        self._client = httpx.Client(base_url=process.url, timeout=20)

    def __enter__(self) -> Self:
        self._ask()
        self._texts, self._before = self._ask(), Footprint.of(self._process.process.pid)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._client.close()

    def check(self) -> None:
        assert self._process.process.poll() is None
        _eventually(lambda: self._gauges() == {0.0})
        for probe in ("live", "ready"):
            assert self._client.get(f"/v2/health/{probe}").status_code == 200
        assert self._ask() == self._texts
        Footprint.check(self._process.process.pid, self._before)

    def refused(self, status: int, **body: Any) -> str:
        name = f"refused-{time.monotonic_ns()}"
        response = self._client.post("/v3/completions", json=body, headers={"X-Request-Id": name})
        assert response.status_code == status, response.text
        check_clean(response.text)
        _eventually(lambda: any(f"[{name}]" in line for line in self._process.lines))
        check_logged_once(self._process.lines, name)
        return response.text

    def _gauges(self) -> set[float]:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        lines = self._client.get("/metrics").text.splitlines()
        return {float(line.split()[-1]) for line in lines if line.startswith(names)}

    def _ask(self) -> list[str]:
        answers = [self._client.post("/v1/completions", json=body) for body in self._bodies]
        return [str(answer.json()["choices"][0]["text"]) for answer in answers]


def _eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + _SECONDS
    while not holds():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.02)
