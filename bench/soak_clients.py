"""The clients of the soak: good, bad, slow and vanishing ones, and an operator who changes adapters and config.json.

Owns what each does and what it must be answered. Knows the server by its address and the folder only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.soak_server import VERSIONS, SoakFolder

_MOVING = "moving"  # the alias that is loaded, swapped and unloaded all the time
_PROMPTS = ("hello there", "Once upon a time there was", "SELECT icao FROM table", "a " * 90)
_TOKENS = 24
_WEIGHTS = {"good": 60, "bad": 20, "slow": 8, "vanishing": 12}
_SECONDS = 300.0  # more than any answer takes; machines may stand still
_MOST_FAULTS = 20
# None is used again just when the server closes it for being idle: no client could tell that from a fault.
_CONNECTIONS = httpx.Limits(keepalive_expiry=2)
_JSON = {"Content-Type": "application/json"}

# Path, body, statuses that are right.
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v3/completions", b"{", 412),
    ("/v3/completions", b"[" * 1000, 412),
    ("/v3/completions", {"model": "base"}, 400),
    ("/v3/completions", {"model": "nobody", "prompt": "hi"}, 404),
    ("/v3/completions", {"model": "base", "prompt": "hi", "temperature": 9}, 400),
    ("/v3/chat/completions", {"model": "base", "messages": "hi"}, 400),
    ("/v3/completions", {"model": "base", "prompt": "long " * 2000}, 400),
    ("/v1/completions", {"model": "base", "prompt": "x" * 3_000_000}, 413),
    ("/v1/completions", {"model": "nobody", "prompt": "hi"}, 404),
    ("/v1/completions", {"model": "base", "prompt": "hi", "n": 0}, 400),
    ("/v1/completions", {"model": "base", "prompt": "hi", "lora": [{"alias": "nobody"}]}, 404),
    ("/v1/completions", {"model": "base", "prompt": "hi", "structured_outputs": {"regex": "(((("}}, 400),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404),
    ("/v1/nowhere", {}, 404),
)


@dataclass(frozen=True, slots=True)
class Canary:
    """A greedy request whose answer is known. A `moving` one's adapter may also be gone."""

    model: str
    prompt: str

    @property
    def may_be_gone(self) -> bool:
        """Whether 404 is right, too."""
        return self.model in (_MOVING, "guest")

    def body(self, **more: Any) -> dict[str, Any]:
        """Return the request's body."""
        fixed = {"temperature": 0, "max_tokens": _TOKENS, "ignore_eos": True}
        return {"model": self.model, "prompt": self.prompt, **fixed, **more}


@dataclass
class Tally:
    """What has happened: answers by kind of client and status, seconds of good ones, and what was wrong."""

    answers: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Note what must not happen; the first ones are enough."""
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(text)


class Traffic:
    """Clients of one server. `learn` its right answers while it is quiet, then `run`."""

    def __init__(self, url: str, folder: SoakFolder, *, seed: int = 0) -> None:
        self._url = url
        self._folder = folder
        self._rng = random.Random(seed)  # not for secrets
        self._right: dict[Canary, set[str]] = {}
        self.tally = Tally()

    async def learn(self) -> None:
        """Ask every canary once, with each version of what will move."""
        async with self._client() as client:
            for version in VERSIONS:
                await self._load(client, version)
                for model, prompt in itertools.product(("base", "stay", "mix", "guest", _MOVING), _PROMPTS):
                    answer = await client.post("/v1/completions", json=Canary(model, prompt).body())
                    self._right.setdefault(Canary(model, prompt), set()).add(_text(answer))
        texts = [self._right[Canary(model, _PROMPTS[0])] for model in ("base", "stay", "mix", "guest", _MOVING)]
        assert len(set.union(*texts)) == 6, "every model and version answers in its own way"

    async def run(self, seconds: float, clients: int) -> None:
        """Let that many clients, and an operator, act for a while."""
        self.tally = Tally()
        until = time.monotonic() + seconds
        async with self._client() as client:
            acting = [self._act(client, until) for _ in range(clients)]
            await asyncio.gather(*acting, self._move_adapters(client, until), self._change_config(client, until))

    async def check_canaries(self) -> None:
        """Ask all canaries one after another."""
        async with self._client() as client:
            for canary in self._right:
                await self._good(client, canary)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self._url, timeout=_SECONDS, limits=_CONNECTIONS)

    async def _act(self, client: httpx.AsyncClient, until: float) -> None:
        canaries = list(self._right)
        while time.monotonic() < until:
            (kind,) = self._rng.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))
            try:
                await self._ask(client, kind, self._rng.choice(canaries))
            except httpx.TransportError as error:
                self.tally.fault(f"a {kind} client lost its connection: {error!r}")

    async def _ask(self, client: httpx.AsyncClient, kind: str, canary: Canary) -> None:
        match kind:
            case "good":
                await self._good(client, canary)
            case "bad":
                await self._bad(client, *self._rng.choice(BAD))
            case "slow":
                await self._streaming(client, canary, pause=0.05)
            case _:
                await self._vanishing(client, canary)

    async def _good(self, client: httpx.AsyncClient, canary: Canary) -> None:
        if self._rng.random() < 0.4:
            await self._streaming(client, canary)
            return
        begun = time.perf_counter()
        answer = await client.post(self._rng.choice(("/v1/completions", "/v3/completions")), json=canary.body())
        self.tally.seconds.append(time.perf_counter() - begun)
        self._judge("good", canary, answer.status_code, _text(answer))

    async def _bad(self, client: httpx.AsyncClient, path: str, body: Any, status: int) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post(path, content=content, headers=_JSON)
        self.tally.answers[f"bad {answer.status_code}"] += 1
        if answer.status_code != status:
            self.tally.fault(f"{path} answered {answer.status_code} in place of {status}: {answer.text[:200]}")

    async def _streaming(self, client: httpx.AsyncClient, canary: Canary, *, pause: float = 0) -> None:
        kind, pieces = "slow" if pause else "stream", []
        async with client.stream("POST", "/v1/completions", json=canary.body(stream=True)) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    pieces.append(event["choices"][0]["text"] if "choices" in event else str(event))
                    await asyncio.sleep(pause)
        self._judge(kind, canary, answer.status_code, "".join(pieces))

    async def _vanishing(self, client: httpx.AsyncClient, canary: Canary) -> None:
        """Leave in the middle of a stream, while waiting for an answer, or before all is said."""
        self.tally.answers["vanished"] += 1
        match self._rng.randrange(3):
            case 0:
                async with client.stream("POST", "/v1/completions", json=canary.body(stream=True)) as answer:
                    async for _ in answer.aiter_bytes():
                        break
            case 1:
                with contextlib.suppress(httpx.TimeoutException):
                    await client.post("/v3/completions", json=canary.body(), timeout=self._rng.uniform(0.001, 0.05))
            case _:
                address = httpx.URL(self._url)
                _, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(b"POST /v3/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
                await writer.drain()
                writer.close()
                await writer.wait_closed()

    async def _move_adapters(self, client: httpx.AsyncClient, until: float) -> None:
        for turn in itertools.count():
            if time.monotonic() >= until:
                break
            await self._load(client, VERSIONS[turn % 2])
            if turn % 4 == 3:
                await self._update(client, "unload", 200, lora_name=_MOVING)
                await asyncio.sleep(0.05)
            if turn % 7 == 6:
                await self._update(client, "load", 422, lora_name="x", lora_path=str(self._folder.loras / "bad"))
            await asyncio.sleep(0.1)
        await self._load(client, VERSIONS[0])

    async def _change_config(self, client: httpx.AsyncClient, until: float) -> None:
        with_guest, without = self._folder.described("stay", "guest"), self._folder.described("stay")
        for text in itertools.cycle((without, with_guest[:100], with_guest, "", without, without[:-1], with_guest)):
            if time.monotonic() >= until:
                break
            self._folder.write_config(text)
            answer = await client.post("/v1/config/reload")
            self.tally.answers[f"reload {answer.status_code}"] += 1
            await asyncio.sleep(0.5)
        self._folder.write_config(with_guest)
        await client.post("/v1/config/reload")

    async def _load(self, client: httpx.AsyncClient, version: str) -> None:
        path = str(self._folder.loras / version)
        await self._update(client, "load", 200, lora_name=_MOVING, lora_path=path, load_inplace=True)

    async def _update(self, client: httpx.AsyncClient, verb: str, status: int, **body: Any) -> None:
        answer = await client.post(f"/v1/{verb}_lora_adapter", json=body)
        self.tally.answers[f"{verb} {answer.status_code}"] += 1
        if answer.status_code != status:
            self.tally.fault(f"{verb} answered {answer.status_code} in place of {status}: {answer.text[:200]}")

    def _judge(self, kind: str, canary: Canary, status: int, text: str) -> None:
        self.tally.answers[f"{kind} {status}"] += 1
        if status == 404 and canary.may_be_gone:
            return
        if status != 200 or text not in self._right[canary]:
            self.tally.fault(f"a wrong answer: {canary.model} {canary.prompt[:20]!r}: {status} {text!r}")


def _text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"]) if answer.is_success else answer.text
