"""The same request streamed and not gives the same text, whatever it writes and wherever it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.scheduler import Chunk
from tests.fakes import EOS, FakeRunner
from tests.server.serving import FakeModels, Served, chunks_of, piece_of, serving

pytestmark = pytest.mark.anyio


class EchoRunner(FakeRunner):
    """Writes the prompt once more, byte by byte, then EOS; sometimes another letter, by the random numbers."""

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        prompt = chunk.sequence.request.prompt_token_ids
        place = len(context) - len(prompt)
        row = np.full(self.vocab_size, -30.0, np.float32)
        row[ord("a") : ord("e")] = 0.0
        row[prompt[place] if 0 <= place < len(prompt) else EOS] = 3.0
        return row


@pytest.fixture(scope="module")
async def echoing() -> AsyncIterator[Served]:
    async with serving(FakeModels(runner=lambda: EchoRunner(num_blocks=1024))) as server:
        yield server


def written() -> st.SearchStrategy[str]:
    letters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab é你😀\u0301 \n")
    return st.text(letters, min_size=1, max_size=24)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a request that often stops within what it writes."""
    text = draw(written())
    cuts = st.integers(0, len(text)).flatmap(lambda at: st.integers(1, 4).map(lambda size: text[at : at + size]))
    stops = draw(st.lists((cuts | st.text("ab€", min_size=1, max_size=3)).filter(bool), max_size=3))
    body: dict[str, Any] = {
        "model": "m",
        "prompt": draw(st.sampled_from([text, list(text.encode())])),
        "stop": stops,
        "max_tokens": draw(st.integers(1, 64)),
        "temperature": draw(st.sampled_from([0, 1.0])),
        "seed": draw(st.integers(0, 9)),
        "echo": draw(st.booleans()),
    }
    return body | draw(st.sampled_from([{}, {"logprobs": 2}, {"frequency_penalty": 1.5}, {"ignore_eos": True}]))


async def whole_choices(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await served.post(path, **body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


async def streamed_choices(served: Served, path: str, body: dict[str, Any], n: int = 1) -> list[dict[str, Any]]:
    """Return what the chunks of a stream come to."""
    response = await served.post(path, **body, stream=True)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = [{"text": "", "tokens": []} for _ in range(n)]
    for chunk in chunks_of(response.text):
        (choice,) = chunk["choices"]
        one = found[choice["index"]]
        assert "finish_reason" not in one or one["finish_reason"] is None, "a chunk after the end"
        one["text"] += piece_of(chunk)
        one["tokens"] += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        one |= {key: choice[key] for key in ("finish_reason", "stop_reason") if key in choice}
    return found


def check_alike(whole: dict[str, Any], streamed: dict[str, Any]) -> None:
    assert streamed["text"] == whole["text"]
    assert streamed["finish_reason"] == whole["finish_reason"]
    assert streamed["tokens"] == (whole["logprobs"]["tokens"] if whole["logprobs"] else [])


@given(body=requests(), include=st.booleans(), min_tokens=st.integers(0, 6), n=st.integers(1, 3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_v1(echoing: Served, body: dict[str, Any], include: bool, min_tokens: int, n: int) -> None:
    extra = {"include_stop_str_in_output": include, "min_tokens": min(min_tokens, body["max_tokens"]), "n": n}
    whole = await whole_choices(echoing, "/v1/completions", body | extra)
    streamed = await streamed_choices(echoing, "/v1/completions", body | extra, n)
    for one, other in zip(whole, streamed, strict=True):
        check_alike(one, other)
        assert other["stop_reason"] == one["stop_reason"]


@given(body=requests())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_v3(echoing: Served, body: dict[str, Any]) -> None:
    (streamed,) = await streamed_choices(echoing, "/v3/completions", body)
    (whole,) = await whole_choices(echoing, "/v3/completions", body | {"include_stop_str_in_output": True})
    check_alike(whole, streamed)
    (cut,) = await whole_choices(echoing, "/v3/completions", body)
    matched = streamed["text"].removeprefix(cut["text"])
    assert streamed["text"] == cut["text"] + matched
    assert matched in ("", *body["stop"])


@given(body=requests())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_text_is_what_the_model_writes_up_to_the_first_stop_string(
    echoing: Served, body: dict[str, Any]
) -> None:
    (choice,) = await whole_choices(echoing, "/v1/completions", body | {"temperature": 0, "frequency_penalty": 0})
    prompt = body["prompt"] if isinstance(body["prompt"], str) else bytes(body["prompt"]).decode()
    text = prompt.encode()[: body["max_tokens"]].decode(errors="replace")
    found = sorted((text.index(stop), len(stop), stop) for stop in body["stop"] if stop in text)
    ends = [text.index(stop) + len(stop) for _, _, stop in found]
    # Texts grow by a character at a time, so the stop string that is complete first counts.
    cuts = [at for at, size, _ in found if at + size == min(ends)]
    expected = text[: min(cuts)] if cuts else text
    assert choice["text"] == (prompt if body["echo"] else "") + expected


@given(text=written(), stop=st.text("ab ", min_size=1, max_size=2), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_chat(echoing: Served, text: str, stop: str, seed: int) -> None:
    messages = [{"role": "user", "content": text}]
    body = {"model": "m", "messages": messages, "stop": stop, "seed": seed, "max_tokens": 40, "temperature": 1}
    whole = await echoing.text("/v1/chat/completions", **body)
    assert await echoing.text("/v1/chat/completions", **body, stream=True) == whole


async def test_a_seeded_text_is_the_same_in_any_batch(echoing: Served) -> None:
    bodies = [
        {"model": "m", "prompt": f"text {at} 你😀", "seed": at, "max_tokens": 20, "n": 3, "top_p": 0.95}
        for at in range(8)
    ]
    alone = [await whole_choices(echoing, "/v1/completions", body) for body in bodies]
    together = await asyncio.gather(*(whole_choices(echoing, "/v1/completions", body) for body in bodies))
    assert together == alone
    assert len({choice["text"] for choices in alone for choice in choices}) > len(bodies)
