"""The OpenAI dialect's fields: what is refused, with the field named, and what is taken."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.serving import Served, serving, with_defaults

pytestmark = pytest.mark.anyio

COMPLETION_BASE: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 3}
CHAT_BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}

COMMON_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("max_tokens", {"max_tokens": -1}, "max_tokens must be between 0 and 4294967295"),
    ("max_tokens", {"max_tokens": "5"}, "max_tokens must be an integer"),
    ("max_tokens", {"max_tokens": 0}, "{no tokens}"),
    (
        "max_tokens",
        {"max_tokens": 512},
        "Number of prompt tokens: {prompt} + max tokens value: 512 exceeds model max length: 512",
    ),
    ("temperature", {"temperature": 2.1}, "temperature must be between 0 and 2"),
    ("temperature", {"temperature": -1}, "temperature must be between 0 and 2"),
    ("temperature", {"temperature": "x"}, "temperature must be a number"),
    ("top_p", {"top_p": 0}, "top_p must be in (0, 1]"),
    ("top_p", {"top_p": 1.1}, "top_p must be in (0, 1]"),
    ("n", {"n": 0}, "n must be between 1 and 128"),
    ("n", {"n": 129}, "n must be between 1 and 128"),
    ("stream", {"stream": "true"}, "stream must be true or false"),
    (
        "stream_options",
        {"stream_options": {"include_usage": True}},
        "Stream options can only be defined when `stream=True`.",
    ),
    ("stream_options", {"stream_options": 5}, "Stream options can only be defined when `stream=True`."),
    ("stream_options", {"stream_options": 5, "stream": True}, "stream_options is not an object"),
    ("seed", {"seed": 2**63}, "seed must be between -9223372036854775808 and 9223372036854775807"),
    ("stop", {"stop": 1}, "stop is not a string or array of strings"),
    ("stop", {"stop": [""]}, "stop contains an empty string"),
    ("presence_penalty", {"presence_penalty": 3}, "presence_penalty must be between -2 and 2"),
    ("frequency_penalty", {"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2"),
    ("logit_bias", {"logit_bias": []}, "logit_bias must be an object"),
    ("logit_bias", {"logit_bias": {"a": 1}}, "logit_bias keys must be token ids"),
    ("logit_bias", {"logit_bias": {"1": 101}}, "logit_bias values must be between -100 and 100"),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias must have no more than 300 entries"),
    ("logit_bias", {"logit_bias": {"257": 1}}, "logit_bias holds a token id outside of 0 … 256"),
    ("stop_token_ids", {"stop_token_ids": [257]}, "stop_token_ids holds a token id outside of 0 … 256"),
    ("top_k", {"top_k": -2}, "top_k must be between -1 and 4294967295"),
    ("min_p", {"min_p": 1.5}, "min_p must be between 0 and 1"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty must be greater than zero"),
    ("min_tokens", {"min_tokens": -1}, "min_tokens must be between 0 and 4294967295"),
    ("min_tokens", {"min_tokens": 9}, "min_tokens must be less than or equal to max_tokens=3, got 9."),
    ("stop_token_ids", {"stop_token_ids": [-1]}, "stop_token_ids must not be negative"),
    ("stop_token_ids", {"stop_token_ids": ["a"]}, "stop_token_ids must hold integers"),
    ("ignore_eos", {"ignore_eos": "yes"}, "ignore_eos must be true or false"),
    (
        "response_format",
        {"response_format": {"type": "yaml"}},
        "response_format.type must be one of text, json_object, json_schema",
    ),
    (
        "structured_outputs",
        {"structured_outputs": {}},
        "You must use one kind of structured outputs constraint but none are specified",
    ),
    ("structured_outputs", {"structured_outputs": {"regex": ""}}, "structured_outputs.regex must not be empty"),
    (
        "structured_outputs",
        {"structured_outputs": {"regex": "a", "disable_fallback": 0}},
        "structured_outputs.disable_fallback is not supported",
    ),
    (
        "structured_outputs",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "You can only use one kind of structured outputs constraint but multiple are specified",
    ),
    ("guided_json", {"guided_json": {}}, "guided_json is not supported; use structured_outputs"),
    (
        "guided_whitespace_pattern",
        {"guided_whitespace_pattern": " "},
        "guided_whitespace_pattern is not supported; use structured_outputs",
    ),
    ("use_beam_search", {"use_beam_search": 1}, "use_beam_search must be true or false"),
    (
        "use_beam_search",
        {"use_beam_search": True, "stream": True},
        "Streaming is not currently supported with beam search",
    ),
    ("best_of", {"best_of": 0}, "best_of must be between 1 and 128"),
    ("best_of", {"best_of": 129}, "best_of must be between 1 and 128"),
    ("best_of", {"best_of": 2, "n": 3}, "best_of must not be less than n"),
    ("best_of", {"best_of": 2, "stream": True}, "best_of greater than n cannot be used with stream"),
    (
        "best_of",
        {"best_of": 2, "use_beam_search": True},
        "best_of greater than n cannot be used with use_beam_search",
    ),
    ("bad_words", {"bad_words": ["x"]}, "bad_words is not supported"),
    ("lora", {"lora": []}, "lora is not supported when no dynamic LoRA adapters are available."),
    ("lora_alphas", {"lora_alphas": {}}, "lora_alphas is not supported when no dynamic LoRA adapters are available."),
]

COMPLETIONS_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("prompt", {"prompt": None}, "prompt is not a string"),
    ("prompt", {"prompt": ""}, "prompt is missing"),
    ("prompt", {"prompt": [257]}, "prompt holds a token id outside of 0 … 256"),
    ("prompt", {"prompt": [257], "echo": True}, "prompt holds a token id outside of the vocabulary"),
    ("logprobs", {"logprobs": 21}, "logprobs must be between 0 and 20"),
    ("logprobs", {"logprobs": True}, "logprobs must be an integer"),
    ("suffix", {"suffix": "x"}, "suffix is not supported"),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs is not available with stream"),
]

TOOLS = [{"type": "function", "function": {"name": "f"}}]
USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'

CHAT_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": []}, "Messages array cannot be empty"),
    ("max_completion_tokens", {"max_completion_tokens": "x"}, "max_completion_tokens must be an integer"),
    ("logprobs", {"logprobs": 1}, "logprobs must be true or false"),
    ("top_logprobs", {"top_logprobs": 2}, "when using `top_logprobs`, `logprobs` must be set to true."),
    (
        "tool_choice",
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "When using `tool_choice`, `tools` must be set.",
    ),
    ("tool_choice", {"tool_choice": "auto"}, "When using `tool_choice`, `tools` must be set."),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": "maybe"},
        'Invalid value for `tool_choice`: maybe! Only named tools, "none", "auto" or "required" are supported.',
    ),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": {"function": "f"}},
        f"Invalid value for `function`: `f` in `tool_choice`! {USAGE}",
    ),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": {"function": {}}},
        f"Expected field `name` in `function` in `tool_choice`! {USAGE}",
    ),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": {"function": {"name": ""}}},
        f"Invalid `name` in `function`: `` in `tool_choice`! {USAGE}",
    ),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": {"function": {"name": "g"}}},
        "The tool specified in `tool_choice` does not match any of the specified `tools`",
    ),
    (
        "tool_choice",
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        "a tool_choice that forces a call cannot go together with another constraint",
    ),
    ("tools", {"tools": {}}, "tools must be an array"),
    ("tools", {"tools": [{"type": "web_search"}]}, "tools must have the type function"),
    (
        "tools",
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        "Function object does not contain a valid name field",
    ),
    (
        "tools",
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "Function parameters are not a valid JSON object",
    ),
    ("parallel_tool_calls", {"parallel_tool_calls": "no"}, "parallel_tool_calls must be true or false"),
    (
        "chat_template_kwargs",
        {"chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs cannot hold add_generation_prompt",
    ),
    ("functions", {"functions": [{"name": "f"}]}, "functions is not supported"),
    ("audio", {"audio": {"voice": "x"}}, "audio is not supported"),
    ("modalities", {"modalities": ["audio"]}, "modalities is not supported"),
    ("chat_template", {"chat_template": "x"}, "chat_template is not supported"),
    ("continue_final_message", {"continue_final_message": True}, "continue_final_message is not supported"),
    ("prompt_logprobs", {"prompt_logprobs": 1}, "prompt_logprobs is not supported for chat completions"),
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


async def refusal(served: Served, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Return what refuses a request: the field, and the message."""
    response = await served.client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "BadRequestError", 400), response.text
    return error["param"], error["message"]


@pytest.mark.parametrize(("param", "fields", "message"), COMMON_REFUSED + COMPLETIONS_REFUSED)
async def test_completions_refuse(shared: Served, param: str, fields: dict[str, Any], message: str) -> None:
    words = {"{prompt}": "5", "{no tokens}": "max_tokens must be at least 1 unless echo is set"}
    for name, word in words.items():
        message = message.replace(name, word)
    assert await refusal(shared, "/v1/completions", COMPLETION_BASE | fields) == (param, message)


@pytest.mark.parametrize(("param", "fields", "message"), COMMON_REFUSED + CHAT_REFUSED)
async def test_chat_refuses(shared: Served, param: str, fields: dict[str, Any], message: str) -> None:
    words = {"{prompt}": "11", "{no tokens}": "max_tokens must be at least 1"}
    for name, word in words.items():
        message = message.replace(name, word)
    assert await refusal(shared, "/v1/chat/completions", CHAT_BASE | fields) == (param, message)


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
    body = {"model": 5, "prompt": "hi"}
    assert await refusal(shared, "/v1/completions", body) == ("model", "model must be a string")


async def test_prompt_and_messages_are_required(shared: Served) -> None:
    assert await refusal(shared, "/v1/completions", {"model": "m"}) == ("prompt", "prompt is missing")
    assert await refusal(shared, "/v1/chat/completions", {"model": "m"}) == ("messages", "messages is missing")
