"""Scoring given texts, as lm-eval's `local-completions` does it; transformers says what the numbers are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from operator import itemgetter
from typing import Any

import httpx
import pytest

from ovms_lora.engine.model import load_model
from ovms_lora.server.app import build_app
from ovms_lora.server.model_source import SingleModel
from ovms_lora.server.options import ServerOptions
from tests.engine.lora_models import PRECISE, Array, Base, Bases, log_probabilities, prompt

pytestmark = pytest.mark.anyio

# Context and continuation, in tokens; one prompt takes several steps.
ITEMS = [
    (list(prompt(length, seed)), list(prompt(size, seed + 50)))
    for seed, (length, size) in enumerate([(1, 1), (5, 3), (40, 8), (300, 30), (33, 1)])
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Bases(tmp_path_factory.mktemp("bases")).get("llama")


@pytest.fixture(scope="module")
async def client(base: Base) -> AsyncIterator[httpx.AsyncClient]:
    source = SingleModel("m", base.folder, {"INFERENCE_NUM_THREADS": 1, **PRECISE})
    app = build_app(ServerOptions(poll_seconds=0), source, load_model)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        async with asyncio.timeout(60):
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        yield client


async def scored(client: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Ask as lm-eval does; return the `logprobs` of each choice."""
    prompts = [context + continuation for context, continuation in ITEMS]
    body = {"model": "m", "prompt": prompts, "temperature": 0, "seed": 1234, "logprobs": 1, "echo": True}
    response = await client.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=itemgetter("index"))
    return [choice["logprobs"] for choice in choices]


def rows(base: Base, item: tuple[list[int], list[int]]) -> tuple[Array, list[int]]:
    """Return the log-probabilities that predict the continuation."""
    context, continuation = item
    return log_probabilities(base.torch, context + continuation)[len(context) - 1 : -1], continuation


@pytest.mark.parametrize("path", ["/v1/completions", "/v3/completions"])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_loglikelihoods_of_continuations(
    client: httpx.AsyncClient, base: Base, path: str, max_tokens: int
) -> None:
    for item, logprobs in zip(ITEMS, await scored(client, path, max_tokens=max_tokens), strict=True):
        predicted, continuation = rows(base, item)
        part = slice(len(item[0]), len(item[0]) + len(continuation))
        found, tops = logprobs["token_logprobs"][part], logprobs["top_logprobs"][part]
        expected = [float(row[token]) for row, token in zip(predicted, continuation, strict=True)]
        assert found == pytest.approx(expected, abs=2e-3)
        assert len(logprobs["tokens"]) == len(item[0]) + len(continuation) + max_tokens
        greedy = [value == max(top.values()) for value, top in zip(found, tops, strict=True)]
        assert greedy == (predicted.argmax(-1) == continuation).tolist()
        assert [max(top.values()) for top in tops] == pytest.approx(predicted.max(-1).tolist(), abs=2e-3)


async def test_the_greedy_continuation_is_told_as_such(client: httpx.AsyncClient, base: Base) -> None:
    context = ITEMS[1][0]
    body = {"model": "m", "prompt": context, "temperature": 0, "max_tokens": 4, "logprobs": 0, "ignore_eos": True}
    written = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    tokens = list(context)
    for _ in range(4):
        tokens.append(int(log_probabilities(base.torch, tokens)[-1].argmax()))
    again = {"model": "m", "prompt": tokens, "max_tokens": 1, "logprobs": 1, "echo": True}
    logprobs = (await client.post("/v1/completions", json=again)).json()["choices"][0]["logprobs"]
    found = logprobs["token_logprobs"][len(context) : -1]
    assert found == pytest.approx(written["token_logprobs"], abs=2e-3)
    assert found == [max(top.values()) for top in logprobs["top_logprobs"][len(context) : -1]]


async def test_vllms_prompt_logprobs_are_the_same_numbers(client: httpx.AsyncClient, base: Base) -> None:
    context, continuation = ITEMS[2]
    tokens = context + continuation
    body = {"model": "m", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 3}
    entries = (await client.post("/v1/completions", json=body)).json()["choices"][0]["prompt_logprobs"]
    expected = log_probabilities(base.torch, tokens)
    assert entries[0] is None
    for row, token, entry in zip(expected, tokens[1:], entries[1:], strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=2e-3)
        best = {int(key): value["logprob"] for key, value in entry.items() if value["rank"] == 1}
        assert best == {int(row.argmax()): pytest.approx(float(row.max()), abs=2e-3)}
