"""The table of contract section 4, row by row: what is refused, with which words, and what is taken."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.server.errors import OVMS_PREFIX
from tests.server.serving import FakeModels, Served, serving

pytestmark = pytest.mark.anyio

BIG = 2**32
MESSAGES = [{"role": "user", "content": "hi"}]
TEXT_ONLY = "This servable supports only text input, but {} has been provided"

COMMON_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is not an unsigned integer"),
    ({"max_tokens": -1}, "max_tokens is not an unsigned integer"),
    ({"max_tokens": 1.5}, "max_tokens is not an unsigned integer"),
    ({"max_tokens": "5"}, "max_tokens is not an unsigned integer"),
    ({"max_tokens": True}, "max_tokens is not an unsigned integer"),
    ({"max_tokens": BIG}, "max_tokens value can't be greater than 4294967295"),
    ({"temperature": "hot"}, "temperature is not a valid number"),
    ({"temperature": True}, "temperature is not a valid number"),
    ({"temperature": -0.1}, "temperature out of range(0.0, 2.0)"),
    ({"temperature": 2.1}, "temperature out of range(0.0, 2.0)"),
    ({"top_p": "x"}, "top_p is not a valid number"),
    ({"top_p": -0.1}, "top_p out of range(0.0, 1.0)"),
    ({"top_p": 1.1}, "top_p out of range(0.0, 1.0)"),
    ({"min_p": -0.1}, "min_p out of range [0.0, 1.0)"),
    ({"min_p": 1}, "min_p out of range [0.0, 1.0)"),
    ({"top_k": 0}, "top_k must be -1 (all tokens) or a positive integer"),
    ({"top_k": -2}, "top_k must be -1 (all tokens) or a positive integer"),
    ({"top_k": 1.5}, "top_k is not an integer"),
    ({"top_k": "1"}, "top_k is not an integer"),
    ({"frequency_penalty": "x"}, "frequency_penalty is not a valid number"),
    ({"frequency_penalty": 2.1}, "frequency_penalty out of range(-2.0, 2.0)"),
    ({"presence_penalty": []}, "presence_penalty is not a valid number"),
    ({"presence_penalty": -2.1}, "presence_penalty out of range(-2.0, 2.0)"),
    ({"repetition_penalty": "x"}, "repetition_penalty is not a valid number"),
    ({"length_penalty": "x"}, "length_penalty is not a valid number"),
    ({"seed": "x"}, "seed is not an integer"),
    ({"seed": 1.5}, "seed is not an integer"),
    ({"seed": -1}, "seed out of range [0, 4294967295]"),
    ({"seed": BIG}, "seed out of range [0, 4294967295]"),
    ({"stop": 5}, "stop is not a string or array of strings"),
    ({"stop": ["a", 5]}, "stop array contains non string element"),
    ({"stop": ["a"] * 17}, "stop array must have no more than 16 strings"),
    ({"stop": ["a" * 257]}, "stop strings must have no more than 256 characters"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output accepts values true or false"),
    (
        {"include_stop_str_in_output": False, "stream": True},
        "include_stop_str_in_output cannot be set to false if streaming is used",
    ),
    ({"num_assistant_tokens": -1}, "num_assistant_tokens is not an unsigned integer"),
    ({"num_assistant_tokens": 1.5}, "num_assistant_tokens is not an unsigned integer"),
    ({"num_assistant_tokens": BIG}, "num_assistant_tokens is not an unsigned integer"),
    ({"max_ngram_size": "3"}, "max_ngram_size is not an unsigned integer"),
    ({"assistant_confidence_threshold": "x"}, "assistant_confidence_threshold is not a valid number"),
    ({"assistant_confidence_threshold": 1.5}, "assistant_confidence_threshold out of range [0.0, 1.0]"),
    ({"n": 0}, "n value should be greater than 0"),
    ({"n": -1}, "n is not an unsigned integer"),
    ({"n": "1"}, "n is not an unsigned integer"),
    ({"n": 2}, "n value cannot be greater than best_of"),
    ({"best_of": 0}, "best_of value should be greater than 0"),
    ({"best_of": -1}, "best_of is not an unsigned integer"),
    ({"best_of": 20}, "best_of exceeds limit provided in graph config: 20"),
    ({"best_of": 1, "stream": True}, "best_of cannot be used in streaming mode"),
    ({"best_of": "2"}, "best_of is not an unsigned integer"),
    ({"best_of": 2, "stream": True}, "best_of cannot be used in streaming mode"),
    ({"best_of": 2, "n": 3}, "n value cannot be greater than best_of"),
    ({"ignore_eos": 1}, "ignore_eos accepts values true or false"),
    ({"skip_special_tokens": 1}, "skip_special_tokens is not a bool"),
    ({"stream_options": {"include_usage": True}}, "stream_options provided, but stream not set to true"),
    ({"stream_options": 5}, "stream_options provided, but stream not set to true"),
    ({"stream_options": 5, "stream": False}, "stream_options provided, but stream not set to true"),
    ({"stream_options": 1, "stream": True}, "stream_options is not an object"),
    (
        {"stream_options": {"include_usage": 1}, "stream": True},
        "stream_options.include_usage is not a boolean",
    ),
    (
        {"stream_options": {"other": 1}, "stream": True},
        "Found unexpected stream options. Properties accepted in stream_options: include_usage",
    ),
    ({"response_format": "json_object"}, "response_format is not an object"),
    ({"response_format": {"type": "json"}}, "response_format.type must be one of text, json_object, json_schema"),
    ({"lora_alphas": 1}, "lora_alphas must be an object"),
    ({"lora_alphas": {"x": "y"}}, "lora_alphas value for 'x' must be a number"),
    (
        {"lora_alphas": {"x": 1}},
        "lora_alphas is not supported when no dynamic LoRA adapters are available.",
    ),
    ({"lora": [{"alias": "x"}]}, "lora is not supported when no dynamic LoRA adapters are available."),
    ({"max_tokens": 510}, "Number of prompt tokens: {prompt} + max tokens value: 510 exceeds model max length: 512"),
]

COMPLETIONS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is not a string"),
    ({"prompt": 5}, "prompt is not a string"),
    ({"prompt": {"a": 1}}, "prompt is not a string"),
    ({"prompt": [None]}, "prompt is not a string"),
    ({"prompt": [1, "a"]}, "prompt is not a string"),
    ({"prompt": [True]}, "prompt is not a string"),
    ({"prompt": ""}, "prompt is missing"),
    ({"prompt": []}, "prompt is missing"),
    ({"prompt": ["a", ""]}, "prompt is missing"),
    ({"prompt": [[]]}, "prompt is missing"),
    ({"prompt": ["a"] * 257}, "prompt array must have no more than 256 prompts"),
    ({"prompt": [300]}, "prompt holds a token id outside of 0 … 256"),
    ({"prompt": "x" * 513}, "Number of prompt tokens: 513 exceeds model max length: 512"),
    ({"max_tokens": 0}, "max_tokens value should be greater than 0 unless echo is set"),
    ({"logprobs": True}, "logprobs accepts integer values"),
    ({"logprobs": 1.5}, "logprobs accepts integer values"),
    ({"logprobs": 21}, "logprobs out of range [0, 20]"),
    ({"echo": 1}, "echo accepts values true or false"),
]

TOOLS = [{"type": "function", "function": {"name": "f"}}]

CHAT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "Messages are not an array"),
    ({"messages": {}}, "Messages are not an array"),
    ({"messages": []}, "Messages array cannot be empty"),
    ({"messages": ["hi"]}, "Message is not a JSON object"),
    ({"messages": [{"content": "hi"}]}, "Every message must have 'role' field"),
    ({"messages": [{"role": 1, "content": "hi"}]}, "Every message must have 'role' field"),
    (
        {"messages": [{"role": "user", "content": ["hi"]}]},
        "Invalid message structure - content array should contain objects",
    ),
    (
        {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        "Invalid message structure - content object type missing",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "Invalid message structure - content text missing",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "Unsupported content type"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, TEXT_ONLY.format("image_url")),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, TEXT_ONLY.format("input_audio")),
    ({"max_tokens": 0}, "max_tokens value should be greater than 0"),
    ({"max_completion_tokens": 0}, "max_tokens value should be greater than 0"),
    ({"max_completion_tokens": -1}, "max_completion_tokens is not an unsigned integer"),
    ({"max_completion_tokens": BIG}, "max_completion_tokens value can't be greater than 4294967295"),
    ({"logprobs": 1}, "logprobs accepts values true or false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs out of range [0, 20]"),
    ({"top_logprobs": 1}, "top_logprobs requires logprobs to be true"),
    ({"tools": {}}, "Tools are not an array"),
    ({"tool_choice": "maybe"}, "tool_choice should be either 'none' or 'auto' or 'required'"),
    ({"tool_choice": 1}, "tool_choice is not a valid JSON object or string"),
    ({"tool_choice": {}}, "tool_choice.function is not a valid JSON object"),
    ({"tool_choice": {"function": {"name": 1}}}, "tool_choice.function.name is not a valid string"),
    (
        {"tools": TOOLS, "tool_choice": {"function": {"name": "g"}}},
        "The tool specified in `tool_choice` does not match any of the specified `tools`",
    ),
    ({"tools": ["f"]}, "Tool is not a JSON object"),
    ({"tools": [{"type": 1}]}, "Tool type is missing or invalid"),
    ({"tools": [{"type": "function", "function": "f"}]}, "Function is not a valid JSON object"),
    ({"tools": [{"type": "function", "function": {}}]}, "Function object does not contain a valid name field"),
    ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "Function parameters are not a valid JSON object"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls is not a bool"),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "tool_calls must be an array"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "Each tool_call must be an object"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "Each tool_call must have a 'function' object"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs cannot hold tools"),
    (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs cannot hold add_generation_prompt",
    ),
    ({"chat_template_kwargs": []}, "chat_template_kwargs must be an object"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs cannot hold messages"),
]

OPTIONAL = (
    *("temperature", "top_p", "min_p", "top_k", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("length_penalty", "seed", "stop", "include_stop_str_in_output", "n", "best_of", "logprobs", "top_logprobs"),
    *(
        "echo",
        "ignore_eos",
        "skip_special_tokens",
        "stream_options",
        "tools",
        "tool_choice",
        "response_format",
        "parallel_tool_calls",
    ),
    *("chat_template_kwargs", "lora_alphas", "lora", "max_completion_tokens"),
)

ACCEPTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2},
    {"top_p": 0},
    {"top_p": 1},
    {"min_p": 0.99},
    {"top_k": -1},
    {"top_k": 1},
    {"frequency_penalty": -2, "presence_penalty": 2},
    {"repetition_penalty": 1.3, "length_penalty": -1},
    {"seed": 0},
    {"seed": BIG - 1},
    {"stop": "x"},
    {"stop": []},
    {"stop": [f"{i}" for i in range(16)]},
    {"include_stop_str_in_output": True},
    {"n": 1, "best_of": 1},
    {"best_of": 1},
    {"best_of": 19},
    {"best_of": 3, "n": 3, "length_penalty": 2},
    {"best_of": None, "stream": True},
    {"ignore_eos": True, "skip_special_tokens": False},
    {"stream": False},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_object"}},
    {"unheard_of": {"deeply": ["nested"]}, "logit_bias": {"1": 5}},
    {name: None for name in OPTIONAL},
]

COMPLETIONS_ACCEPTED: list[dict[str, Any]] = [
    {"prompt": ["a", "b"]},
    {"prompt": [104, 105]},
    {"prompt": [[104], [105]]},
    {"logprobs": 0},
    {"logprobs": 20},
    {"max_tokens": 0, "echo": True},
    {"max_tokens": 507},
]

CHAT_ACCEPTED: list[dict[str, Any]] = [
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {"logprobs": True, "top_logprobs": 20},
    {"max_tokens": 0, "max_completion_tokens": 3},
    {"tools": TOOLS, "tool_choice": "auto"},
    {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False},
    {"tools": [*TOOLS, {"type": "web_search"}]},
    {"tools": [], "tool_choice": "required"},
    {"tool_choice": "required"},
    {"messages": [{"role": "assistant", "tool_calls": None}, {"role": "tool", "tool_call_id": "x", "content": "5"}]},
    {"chat_template_kwargs": {"enable_thinking": False}},
]

COMPLETION_BASE: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 3}
CHAT_BASE: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 3}


async def refusal(served: Served, path: str, body: dict[str, Any]) -> str:
    response = await served.client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.startswith(OVMS_PREFIX)
    return str(error.removeprefix(OVMS_PREFIX))


@pytest.mark.parametrize(("fields", "message"), COMMON_REFUSED + COMPLETIONS_REFUSED)
async def test_completions_refuse(shared: Served, fields: dict[str, Any], message: str) -> None:
    detail = await refusal(shared, "/v3/completions", COMPLETION_BASE | fields)
    assert detail == message.replace("{prompt}", "5")


@pytest.mark.parametrize(("fields", "message"), COMMON_REFUSED + CHAT_REFUSED)
async def test_chat_refuses(shared: Served, fields: dict[str, Any], message: str) -> None:
    detail = await refusal(shared, "/v3/chat/completions", CHAT_BASE | fields)
    assert detail == message.replace("{prompt}", "11")


@pytest.mark.parametrize("fields", ACCEPTED + COMPLETIONS_ACCEPTED)
async def test_completions_accept(shared: Served, fields: dict[str, Any]) -> None:
    response = await shared.client.post("/v3/completions", json=COMPLETION_BASE | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("fields", ACCEPTED + CHAT_ACCEPTED)
async def test_chat_accepts(shared: Served, fields: dict[str, Any]) -> None:
    response = await shared.client.post("/v3/chat/completions", json=CHAT_BASE | fields)
    assert response.status_code == 200, response.text


async def test_prompt_and_messages_are_required(shared: Served) -> None:
    assert await refusal(shared, "/v3/completions", {"model": "m"}) == "prompt is missing"
    assert await refusal(shared, "/v3/chat/completions", {"model": "m"}) == "Messages missing in request"


async def test_the_graph_limits_max_tokens() -> None:
    async with serving(FakeModels(options=EngineOptions(max_tokens_limit=8))) as served:
        over = "max_tokens exceeds limit provided in graph config: 8"
        assert await refusal(served, "/v3/completions", COMPLETION_BASE | {"max_tokens": 8}) == over
        assert (await served.client.post("/v3/completions", json=COMPLETION_BASE | {"max_tokens": 7})).is_success
        body = {"model": "m", "messages": MESSAGES}
        at = await served.client.post("/v3/chat/completions", json=body | {"max_completion_tokens": 8})
        assert at.json()["usage"]["completion_tokens"] == 8
        over = "max_completion_tokens exceeds limit provided in graph config: 8"
        assert await refusal(served, "/v3/chat/completions", body | {"max_completion_tokens": 9}) == over
        default = await served.client.post("/v3/chat/completions", json=body)
        assert default.json()["usage"]["completion_tokens"] == 8


async def test_the_graph_limits_best_of() -> None:
    async with serving(FakeModels(options=EngineOptions(best_of_limit=3))) as served:
        over = "best_of exceeds limit provided in graph config: 3"
        assert await refusal(served, "/v3/completions", COMPLETION_BASE | {"best_of": 3}) == over
        assert (await served.client.post("/v3/completions", json=COMPLETION_BASE | {"best_of": 2})).is_success


async def test_a_model_without_template_refuses_chat() -> None:
    async with serving(FakeModels(template=None)) as served:
        detail = await refusal(served, "/v3/chat/completions", CHAT_BASE)
        assert detail == "this model has no chat template; use completions"


async def test_a_template_that_refuses_is_a_bad_request() -> None:
    async with serving(FakeModels(template="{{ raise_exception('roles must alternate') }}")) as served:
        assert "roles must alternate" in await refusal(served, "/v3/chat/completions", CHAT_BASE)
