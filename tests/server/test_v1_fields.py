"""The OpenAI dialect's fields: what is refused, with the field named, and what is taken."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import Served, serving, with_defaults

pytestmark = pytest.mark.anyio

COMPLETION_BASE: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 3}
CHAT_BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}

COMMON_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 512}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "x"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.1}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("stream", {"stream": "true"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("seed", {"seed": 2**63}),
    ("stop", {"stop": 1}),
    ("stop", {"stop": [""]}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("logit_bias", {"logit_bias": []}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
    ("logit_bias", {"logit_bias": {"257": 1}}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 1.5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("stop_token_ids", {"stop_token_ids": [257]}),
    ("stop_token_ids", {"stop_token_ids": ["a"]}),
    ("ignore_eos", {"ignore_eos": "yes"}),
    ("response_format", {"response_format": {"type": "yaml"}}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("guided_json", {"guided_json": {"type": "object"}}),
    ("guided_whitespace_pattern", {"guided_whitespace_pattern": " "}),
    ("use_beam_search", {"use_beam_search": 1}),
    ("use_beam_search", {"use_beam_search": True, "stream": True}),
    ("best_of", {"best_of": 0}),
    ("best_of", {"best_of": 129}),
    ("best_of", {"best_of": 2, "n": 3}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("best_of", {"best_of": 2, "use_beam_search": True}),
    ("bad_words", {"bad_words": ["x"]}),
    ("lora", {"lora": []}),
    ("lora_alphas", {"lora_alphas": {}}),
]

COMPLETIONS_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": [257]}),
    ("prompt", {"prompt": [257], "echo": True}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("suffix", {"suffix": "x"}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
]

TOOLS = [{"type": "function", "function": {"name": "f"}}]

CHAT_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("max_completion_tokens", {"max_completion_tokens": "x"}),
    ("logprobs", {"logprobs": 1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("tool_choice", {"tool_choice": "auto"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "maybe"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"function": "f"}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"function": {}}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"function": {"name": ""}}}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"function": {"name": "g"}}}),
    ("tools", {"tools": {}}),
    ("tools", {"tools": [{"type": "web_search"}]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": ""}}]}),
    ("parallel_tool_calls", {"parallel_tool_calls": "no"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"add_generation_prompt": True}}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("audio", {"audio": {"voice": "x"}}),
    ("modalities", {"modalities": ["audio"]}),
    ("chat_template", {"chat_template": "x"}),
    ("continue_final_message", {"continue_final_message": True}),
    ("prompt_logprobs", {"prompt_logprobs": 1}),
]

ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 0.1, "top_k": 0, "min_p": 0},
    {"n": 3},
    {"seed": -5},
    {"logit_bias": {"97": 100, "98": -100}},
    {"min_tokens": 3, "stop_token_ids": [5]},
    {"best_of": 1},
    {"best_of": 3, "n": 2},
    {"best_of": 2, "n": 2, "stream": True},
    {"use_beam_search": True, "n": 3, "length_penalty": 0.5},
    {"user": "me", "response_format": {"type": "text"}, "use_beam_search": False},
    {"stream": None, "stream_options": None, "n": None, "max_tokens": None, "stop": None, "seed": None},
    {"cache_salt": "mine"},
    {"unheard_of": 1},
]


async def refused_param(served: Served, path: str, body: dict[str, Any]) -> str:
    response = await served.client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "BadRequestError", 400), response.text
    assert error["message"]
    return str(error["param"])


@pytest.mark.parametrize(("param", "fields"), COMMON_REFUSED + COMPLETIONS_REFUSED)
async def test_completions_refuse(shared: Served, param: str, fields: dict[str, Any]) -> None:
    assert await refused_param(shared, "/v1/completions", COMPLETION_BASE | fields) == param


@pytest.mark.parametrize(("param", "fields"), COMMON_REFUSED + CHAT_REFUSED)
async def test_chat_refuses(shared: Served, param: str, fields: dict[str, Any]) -> None:
    assert await refused_param(shared, "/v1/chat/completions", CHAT_BASE | fields) == param


@pytest.mark.parametrize("fields", ACCEPTED)
@pytest.mark.parametrize(("path", "base"), [("/v1/completions", COMPLETION_BASE), ("/v1/chat/completions", CHAT_BASE)])
async def test_accepted(shared: Served, path: str, base: dict[str, Any], fields: dict[str, Any]) -> None:
    response = await shared.client.post(path, json=base | fields)
    assert response.status_code == 200, response.text


async def test_completions_default_to_16_tokens_and_chat_to_the_rest(shared: Served) -> None:
    body = {"prompt": "hello", "temperature": 0}
    assert (await shared.post("/v1/completions", **body)).json()["usage"]["completion_tokens"] == 16
    chat = await shared.post("/v1/chat/completions", messages=CHAT_BASE["messages"])
    assert chat.json()["usage"]["total_tokens"] == 512


async def test_the_folder_stands_between_request_and_defaults() -> None:
    async with serving(with_defaults(temperature=0.0, max_new_tokens=4)) as served:
        texts = {await served.text("/v3/completions", model="m", prompt="hello") for _ in range(3)}
        assert len(texts) == 1
        assert len(texts.pop()) == 4
        assert len(await served.text("/v1/completions", model="m", prompt="hello", max_tokens=6)) == 6


async def test_the_model_may_be_left_out_where_there_is_one(shared: Served) -> None:
    answer = (await shared.post("/v1/completions", prompt="hi")).json()
    assert answer["model"] == "m"


async def test_an_unknown_model_is_named(shared: Served) -> None:
    response = await shared.post("/v1/completions", model="x", prompt="hi")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "The model `x` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_a_model_that_is_no_string_is_refused(shared: Served) -> None:
    assert await refused_param(shared, "/v1/completions", {"model": 5, "prompt": "hi"}) == "model"
