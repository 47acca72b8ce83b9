"""The real openai client, over sockets, against both dialects: answers, streams, and its classes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from ovms_lora.server.errors import OVMS_PREFIX
from tests.server.process import Process, one_model, running
from tests.server.serving import write_lora_config

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
DIALECTS = ("v1", "v3")


def client_of(url: str, dialect: str = "v1", key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/{dialect}", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of `base` with the adapters sql and tools, the composite mix, and of `plain`."""
    path = write_lora_config(tmp_path_factory.mktemp("served"))
    with running("--config_path", str(path), "--rest_port", "0") as process:
        yield process.url


@pytest.fixture(scope="module", params=DIALECTS)
def client(request: pytest.FixtureRequest, url: str) -> Iterator[openai.OpenAI]:
    with client_of(url, request.param) as client:
        yield client


@pytest.fixture(scope="module")
def v1(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.mark.parametrize("model", ["base", "sql", "base:sql", "mix"])
def test_a_completion_whole_and_streamed(client: openai.OpenAI, model: str) -> None:
    completion = client.completions.create(model=model, prompt="hello", max_tokens=5, temperature=0)
    text = completion.choices[0].text
    assert (completion.object, completion.model, len(text)) == ("text_completion", model, 5)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage
    assert (
        completion.usage.to_dict().items() >= {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}.items()
    )
    stream = client.completions.create(model=model, prompt="hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_a_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="mix", messages=MESSAGES, max_tokens=5, temperature=0)
    message = chat.choices[0].message
    assert (chat.object, message.role, len(message.content or "")) == ("chat.completion", "assistant", 5)
    chunks = list(
        client.chat.completions.create(model="mix", messages=MESSAGES, max_tokens=5, temperature=0, stream=True)
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_helper_of_the_client_collects_a_chat(v1: openai.OpenAI) -> None:
    fields: Any = {"model": "base", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    content = v1.chat.completions.create(**fields).choices[0].message.content
    assert content
    with v1.chat.completions.stream(**fields, stop=content[-1]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == content.partition(content[-1])[0]
    assert {"chunk", "content.delta", "content.done"} <= {event.type for event in events}


def test_include_usage_comes_last(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.completions.create(model="base", prompt="hello", max_tokens=4, stream=True, stream_options=options)
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 4)
    chat = list(
        client.chat.completions.create(
            model="base", messages=MESSAGES, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chat[-1].usage
    assert chat[-1].usage.completion_tokens == 4


def test_completion_logprobs(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="sql", prompt="hello", max_tokens=3, logprobs=2, temperature=0)
    logprobs = completion.choices[0].logprobs
    assert logprobs
    assert logprobs.tokens
    assert logprobs.top_logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]
    assert logprobs.text_offset == [0, 1, 2]


def test_chat_logprobs_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "sql", "messages": MESSAGES, "max_tokens": 3, "temperature": 0, "logprobs": True}
    chat = client.chat.completions.create(**fields, top_logprobs=2)
    assert chat.choices[0].logprobs
    content = chat.choices[0].logprobs.content
    assert content
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2]
    streamed = [
        token
        for chunk in client.chat.completions.create(**fields, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == content


def test_several_prompts_and_choices(v1: openai.OpenAI) -> None:
    completion = v1.completions.create(model="base", prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    chat = v1.chat.completions.create(model="base", messages=MESSAGES, n=3, max_tokens=2, seed=7)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    stream = v1.chat.completions.create(model="base", messages=MESSAGES, n=3, max_tokens=2, seed=7, stream=True)
    texts = dict.fromkeys(range(3), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in chat.choices]


def test_adapters_and_extras_go_through_extra_body(client: openai.OpenAI) -> None:
    def text(model: str, **extra: Any) -> str:
        fields: Any = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
        return str(client.completions.create(model=model, **fields, extra_body=extra).choices[0].text)

    parts = [{"alias": "sql", "alpha": 0.7}, {"alias": "tools"}]
    assert text("base", lora=parts) == text("mix")
    assert text("mix", lora_alphas={"sql": 0.1}) != text("mix")
    assert text("base", top_k=1, min_p=0.1, repetition_penalty=1.2)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["plain", "base", "sql", "tools", "mix"]
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": 9}),
    ("top_p", {"top_p": 0}),
    ("n", {"n": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("stop", {"stop": ["x"] * 17}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("seed", {"seed": "x"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("lora", {"extra_body": {"lora": 1}}),
    ("min_tokens", {"extra_body": {"min_tokens": -1}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD_FIELDS)
def test_a_bad_field_is_a_bad_request_error_that_names_it(
    v1: openai.OpenAI, param: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as completion:
        v1.completions.create(model="base", prompt="hello", **fields)
    with pytest.raises(openai.BadRequestError) as chat:
        v1.chat.completions.create(model="base", messages=MESSAGES, **fields)
    for refused in (completion.value, chat.value):
        assert (refused.param, refused.type, refused.status_code) == (param, "BadRequestError", 400)


def test_the_dialects_refuse_with_their_own_words(url: str) -> None:
    with client_of(url, "v3") as v3, pytest.raises(openai.BadRequestError) as refused:
        v3.completions.create(model="base", prompt="hello", temperature=9)
    assert refused.value.response.json() == {"error": OVMS_PREFIX + "temperature out of range(0.0, 2.0)"}
    with client_of(url) as v1, pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 2"):
        v1.completions.create(model="base", prompt="hello", temperature=9)


def test_an_unknown_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as completion:
        client.completions.create(model="nope", prompt="hello")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=MESSAGES, stream=True)
    if "v1" in str(client.base_url):
        assert (completion.value.param, completion.value.code) == ("model", "404")
        assert "The model `nope` does not exist." in str(completion.value)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_wrong_key_is_an_authentication_error(dialect: str) -> None:
    with one_model(API_KEY="secret") as process:
        with client_of(process.url, dialect, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="m", prompt="hello")
        with client_of(process.url, dialect, "secret") as right:
            assert right.completions.create(model="m", prompt="hello", max_tokens=2).choices[0].text


def test_a_bad_adapter_is_an_unprocessable_entity_error(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path)
    (tmp_path / "loras" / "tools" / "adapter_config.json").write_text("{")
    with running("--config_path", str(path), "--rest_port", "0") as process, client_of(process.url) as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.completions.create(model="tools", prompt="hello")
        assert refused.value.code == "adapter_config_invalid"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_body_that_is_too_large_is_a_status_error(url: str, dialect: str) -> None:
    with client_of(url, dialect) as client, pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="base", prompt="x" * (2 * 1024 * 1024))
    assert refused.value.status_code == 413


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_full_queue_is_a_rate_limit_error(dialect: str) -> None:
    with one_model(STEP_SECONDS="0.02", MAX_WAITING="1") as process, client_of(process.url, dialect) as client:
        full = Crowd(process, dialect)
        try:
            with pytest.raises(openai.RateLimitError) as refused:
                while True:
                    client.completions.create(model="m", prompt=["a", "b", "c", "d"], max_tokens=1)
            assert int(refused.value.response.headers["retry-after"]) >= 1
        finally:
            full.leave()


class Crowd:
    """A client whose long stream keeps the server at work until it leaves."""

    def __init__(self, process: Process, dialect: str) -> None:
        self._http = httpx.Client(base_url=process.url)
        body = {"model": "m", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        request = self._http.build_request("POST", f"/{dialect}/completions", json=body)
        self._response = self._http.send(request, stream=True)

    def leave(self) -> None:
        self._response.close()
        self._http.close()


@pytest.mark.anyio
async def test_the_async_client_streams_many_at_once(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def streamed(number: int) -> str:
            model = ("base", "sql", "tools", "mix")[number % 4]
            stream = await client.completions.create(
                model=model, prompt=f"prompt {number}", max_tokens=20, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(streamed(number) for number in range(16)))
    assert all(len(text) == 20 for text in texts)
    assert len(set(texts)) == 16
