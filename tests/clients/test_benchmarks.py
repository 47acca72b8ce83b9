"""The request loops of `vllm bench serve` and of guidellm: many streams at once, each timed token by token.

Both send what their sources send and read what they read: lines of `data: `, `[DONE]` as the end, the text of the first
choice for time to first token and inter-token latency, and `usage` for the number of tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.server.process import one_model

pytestmark = pytest.mark.anyio

STREAMS = 32
TOKENS = 24
STEP_SECONDS = 0.004


@dataclass
class Timing:
    """What a benchmark notes of one request."""

    first_token: float = 0.0
    between_tokens: list[float] = field(default_factory=list)
    whole: float = 0.0
    text: str = ""
    usages: list[dict[str, int]] = field(default_factory=list)
    done: bool = False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with one_model(STEP_SECONDS=str(STEP_SECONDS)) as process:
        yield process.url


async def timed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Timing:
    """Send one request and time its events."""
    timing, begun = Timing(), time.perf_counter()
    last = begun
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line:
                continue
            data = line.removeprefix("data: ")
            assert data != line
            assert not timing.done, "nothing comes after [DONE]"
            if data == "[DONE]":
                timing.done = True
                continue
            event = json.loads(data)
            now = time.perf_counter()
            if event.get("usage"):
                timing.usages.append(event["usage"])
            if event["choices"] and (piece := text_of(event["choices"][0])):
                if not timing.text:
                    timing.first_token = now - begun
                else:
                    timing.between_tokens.append(now - last)
                timing.text += piece
                last = now
    timing.whole = time.perf_counter() - begun
    return timing


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


def vllm_completion(number: int) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": f"prompt {number}",
        "repetition_penalty": 1.0,
        "temperature": 0.0,
        "max_tokens": TOKENS,
        "logprobs": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def vllm_chat(number: int) -> dict[str, Any]:
    content = [{"type": "text", "text": f"prompt {number}"}]
    return {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def guidellm_completion(number: int) -> dict[str, Any]:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "m", "prompt": f"prompt {number}", "max_tokens": TOKENS, "stop": None, "ignore_eos": True}
    return {**body, "stream": True, "stream_options": options}


def guidellm_chat(number: int) -> dict[str, Any]:
    body = guidellm_completion(number)
    del body["prompt"], body["max_tokens"]
    return {**body, "messages": [{"role": "user", "content": f"prompt {number}"}], "max_completion_tokens": TOKENS}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", vllm_completion),
        ("/v3/completions", vllm_completion),
        ("/v1/chat/completions", vllm_chat),
        ("/v3/chat/completions", vllm_chat),
        ("/v1/completions", guidellm_completion),
        ("/v1/chat/completions", guidellm_chat),
    ],
)
async def test_a_benchmark_times_many_streams(url: str, path: str, body: Any) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "m"
        timings = await asyncio.gather(*(timed(client, path, body(number)) for number in range(STREAMS)))
        prompts = [len(f"prompt {number}") for number in range(STREAMS)]
        template = len("<user><a>") if "chat" in path else 0
    for timing, prompt in zip(timings, prompts, strict=True):
        assert timing.done
        assert timing.usages[-1]["completion_tokens"] == TOKENS == len(timing.text)
        assert timing.usages[-1]["prompt_tokens"] == prompt + template
        assert len(timing.between_tokens) == TOKENS - 1
        assert 0 < timing.first_token < timing.whole


async def test_continuous_usage_counts_each_token(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        timing = await timed(client, "/v1/completions", guidellm_completion(0))
    assert [usage["completion_tokens"] for usage in timing.usages] == [*range(1, TOKENS + 1), TOKENS]


async def test_tokens_come_one_by_one_and_not_in_a_burst(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        timing = await timed(client, "/v3/completions", vllm_completion(0))
    assert sum(timing.between_tokens) > (TOKENS - 1) * STEP_SECONDS / 2


async def test_streams_are_batched(url: str) -> None:
    """Many streams at once take far less time than one after another."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        alone = (await timed(client, "/v1/completions", vllm_completion(0))).whole
        begun = time.perf_counter()
        await asyncio.gather(*(timed(client, "/v1/completions", vllm_completion(n)) for n in range(STREAMS)))
        assert time.perf_counter() - begun < alone * STREAMS / 2
