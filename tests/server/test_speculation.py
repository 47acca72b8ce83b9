"""A model that guesses ahead, over HTTP: the same answers in fewer steps, OVMS's fields and words, vLLM's metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.speculation import SpeculationOptions
from ovms_lora.engine.step_cost import StepCost
from ovms_lora.server.errors import OVMS_PREFIX
from tests.fakes import ScriptedRunner
from tests.server.serving import FakeModels, Served, serving

pytestmark = pytest.mark.anyio

TEXT = "one two three, one two three, one two three, and so on, one two three."
LOOKUP = SpeculationOptions()
DRAFT = SpeculationOptions(draft_models_path="draft")
BODY = {"model": "m", "prompt": "count", "temperature": 0}


def models(speculation: SpeculationOptions | None) -> FakeModels:
    return FakeModels(options=EngineOptions(speculation=speculation), runner=lambda: ScriptedRunner(TEXT))


@pytest.fixture
async def guessing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(StepCost, "price", lambda *_: 0.0)
    async with serving(models(LOOKUP)) as served:
        yield served


@pytest.mark.parametrize("path", ["/v3/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_texts_are_those_without_guessing(guessing: Served, path: str, stream: bool) -> None:
    fields = {**BODY, "max_tokens": 200, "stream": stream}
    assert await guessing.text(path, **fields) == TEXT
    stopped = await guessing.text(path, **fields, stop=["and s"])
    assert stopped.startswith("one two three, one two three, one two three, ")
    async with serving(models(None)) as plain:
        assert stopped == await plain.text(path, **fields, stop=["and s"])


async def test_tokens_are_counted_and_their_logprobs_given(guessing: Served) -> None:
    answers = []
    async with serving(models(None)) as plain:
        for served in (guessing, plain):
            response = await served.client.post("/v1/completions", json=BODY | {"max_tokens": 33, "logprobs": 1})
            body = response.json()
            answers.append((body["choices"][0]["logprobs"], body["choices"][0]["finish_reason"], body["usage"]))
    assert answers[0] == answers[1]
    assert answers[0][2]["completion_tokens"] == 33


async def test_guesses_are_counted_in_vllm_s_metrics(guessing: Served) -> None:
    await guessing.text("/v3/completions", **BODY)
    lines = (await guessing.client.get("/metrics")).text.splitlines()
    found = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm:spec_decode")}
    drafts, tokens, accepted = (
        found[f"vllm:spec_decode_num_{name}_total"] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < drafts < accepted < tokens
    (runner,) = guessing.models.runners.values()
    assert len(runner.steps) < len(TEXT)


async def test_a_model_that_does_not_guess_has_no_such_metrics() -> None:
    async with serving(models(None)) as plain:
        text = (await plain.client.get("/metrics")).text
    assert 'vllm:num_requests_running{model_name="m"}' in text
    assert not [line for line in text.splitlines() if line.startswith("vllm:spec_decode")]


@pytest.mark.parametrize(
    ("speculation", "fields", "message"),
    [
        (LOOKUP, {"num_assistant_tokens": 0}, "num_assistant_tokens must be greater than 0 for prompt lookup decoding"),
        (
            LOOKUP,
            {"assistant_confidence_threshold": 0.4},
            "assistant_confidence_threshold is not supported for prompt lookup decoding",
        ),
        (
            DRAFT,
            {"num_assistant_tokens": 0},
            "num_assistant_tokens must be greater than 0 for Fast Draft speculative decoding",
        ),
        (
            DRAFT,
            {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.4},
            "num_assistant_tokens and assistant_confidence_threshold are mutually exclusive; set only one",
        ),
    ],
)
async def test_what_cannot_be_asked_is_refused_in_ovms_s_words(
    speculation: SpeculationOptions, fields: dict[str, Any], message: str
) -> None:
    async with serving(models(speculation)) as served:
        response = await served.client.post("/v3/completions", json=BODY | fields)
        assert response.status_code == 400
        assert response.json() == {"error": OVMS_PREFIX + message}
    async with serving(models(None)) as plain:
        assert (await plain.client.post("/v3/completions", json=BODY | fields)).is_success


async def test_a_request_says_how_far_is_guessed(guessing: Served) -> None:
    (runner,) = guessing.models.runners.values()
    longest = []
    for asked in (1, 4, 12):
        runner.steps.clear()
        await guessing.text("/v3/completions", **BODY, num_assistant_tokens=asked, max_ngram_size=4)
        longest.append(max(count for step in runner.steps[1:] for _, _, _, count in step))
    assert longest == [2, 5, 13]
