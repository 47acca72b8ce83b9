"""Beam search over HTTP: `best_of` on /v3, `use_beam_search` on /v1."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ovms_lora.core.sampling_params import SamplingParams
from tests.engine.harness import generate, request
from tests.server.serving import Served, serving, with_defaults

pytestmark = pytest.mark.anyio

ENDPOINTS = [("/v3/completions", {"prompt": "hello"}), ("/v3/chat/completions", {"messages": [{"role": "user"}]})]
BODY: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 6}


def expected(**sampling: Any) -> list[str]:
    each = request(**{"max_tokens": 6, **sampling})
    answers = generate(each)
    return [answers.of("r", index).text for index in range(each.sampling.n)]


async def choices(served: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    response = await served.post(path, **body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


async def texts(served: Served, path: str = "/v3/completions", **body: Any) -> list[str]:
    return [choice["text"] for choice in await choices(served, path, **BODY | body)]


@pytest.mark.parametrize(("path", "fields"), ENDPOINTS)
async def test_best_of_gives_the_n_best_results_of_a_search_of_that_width(
    shared: Served, path: str, fields: dict[str, Any]
) -> None:
    for n in (1, 2, 5):
        response = await shared.post(path, model="m", **fields, max_tokens=4, best_of=5, n=n)
        answer = response.json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(n))
        assert answer["usage"]["completion_tokens"] == 4 * n


async def test_best_of_is_the_width(shared: Served) -> None:
    assert await texts(shared, best_of=5, n=3) == expected(beam_width=5, n=3)
    assert await texts(shared, best_of=2, n=2) == expected(beam_width=2, n=2)
    assert await texts(shared, best_of=4, length_penalty=3, stop="e") == expected(
        beam_width=4, length_penalty=3, stop="e"
    )


async def test_best_of_one_samples(shared: Served) -> None:
    assert await texts(shared, best_of=1, temperature=0) == expected()


async def test_several_prompts_are_searched_one_by_one(shared: Served) -> None:
    found = await texts(shared, prompt=["hello", "other"], best_of=3, n=2)
    assert found == expected(beam_width=3, n=2) + expected(prompt="other", beam_width=3, n=2)


async def test_use_beam_search_searches_n_wide(shared: Served) -> None:
    assert await texts(shared, "/v1/completions", use_beam_search=True, n=3) == expected(beam_width=3, n=3)
    assert await texts(shared, "/v1/completions", use_beam_search=True) == expected()


async def test_use_beam_search_is_for_chat_too(shared: Served) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "use_beam_search": True, "n": 3}
    found = await choices(shared, "/v1/chat/completions", **body)
    assert len({choice["message"]["content"] for choice in found}) == 3


async def test_echo_and_logprobs_of_every_result(shared: Served) -> None:
    found = await choices(shared, "/v3/completions", **BODY, best_of=3, n=3, echo=True, logprobs=2)
    for choice in found:
        logprobs = choice["logprobs"]
        assert choice["text"].startswith("hello")
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])


async def test_echo_alone_gives_every_result_the_prompt(shared: Served) -> None:
    assert await texts(shared, best_of=3, n=2, max_tokens=0, echo=True) == ["hello"] * 2


async def test_the_folder_says_when_a_search_stops() -> None:
    async with serving(with_defaults(length_penalty=2.0, early_stopping="never")) as served:
        seen: list[SamplingParams] = []
        runner = served.models.runners["m"]
        runner._before_step = lambda chunks: seen.append(chunks[0].sequence.request.sampling)
        await texts(served, best_of=2)
        await texts(served, best_of=2, length_penalty=0.5)
    assert {(sampling.length_penalty, sampling.early_stopping) for sampling in seen} == {(2.0, "never"), (0.5, "never")}


@pytest.mark.parametrize(
    ("path", "fields"), [("/v3/completions", {"best_of": 3}), ("/v1/completions", {"use_beam_search": True})]
)
async def test_every_result_of_a_search_follows_a_schema(shared: Served, path: str, fields: dict[str, Any]) -> None:
    schema = {"enum": ["red", "green", "blue", "white"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    found = await texts(shared, path, **fields, n=3, max_tokens=20, response_format=response_format)
    assert len(set(found)) == 3
    assert {json.loads(text) for text in found} <= set(schema["enum"])
