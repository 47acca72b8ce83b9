"""What answers say: shapes of both dialects, counts, echo, log-probabilities, stops."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeRunner
from tests.server.serving import FakeModels, Served, chunks_of, piece_of, serving, token_ids

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": "m", "temperature": 0}


async def test_a_v3_completion(served: Served) -> None:
    answer = (await served.post("/v3/completions", **GREEDY, prompt="hello", max_tokens=4)).json()
    identity, created = answer.pop("id"), answer.pop("created")
    assert identity.startswith("cmpl-")
    assert isinstance(created, int)
    text = answer["choices"][0]["text"]
    assert len(text) == 4
    assert answer == {
        "choices": [{"finish_reason": "length", "index": 0, "logprobs": None, "text": text}],
        "model": "m",
        "object": "text_completion",
        "usage": {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9},
    }


async def test_a_v3_chat_completion(served: Served) -> None:
    answer = (await served.post("/v3/chat/completions", **GREEDY, messages=MESSAGES, max_tokens=4)).json()
    message = answer["choices"][0]["message"]
    assert (answer["object"], message["role"], len(message["content"])) == ("chat.completion", "assistant", 4)
    assert message["tool_calls"] == []
    assert answer["usage"]["prompt_tokens"] == len("<user>hi<a>")


async def test_a_v1_completion_has_openai_fields(served: Served) -> None:
    answer = (await served.post("/v1/completions", **GREEDY, prompt="hello", max_tokens=4)).json()
    assert answer["system_fingerprint"].startswith("ovms-lora-")
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert answer["choices"][0]["stop_reason"] is None


async def test_chunks_of_a_v3_stream(served: Served) -> None:
    body = GREEDY | {"prompt": "hello", "max_tokens": 3, "stream": True}
    response = await served.post("/v3/completions", **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response.text)
    assert {chunk["object"] for chunk in chunks} == {"text_completion.chunk"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all("usage" not in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_chunks_of_a_chat_stream_begin_with_the_role(served: Served) -> None:
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    for path, empty in (("/v3/chat/completions", None), ("/v1/chat/completions", "")):
        chunks = chunks_of((await served.post(path, **body)).text)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": empty}
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_include_usage_ends_with_a_chunk_of_usage(served: Served) -> None:
    options = {"include_usage": True}
    body = GREEDY | {"prompt": "hello", "max_tokens": 3, "stream": True, "stream_options": options}
    chunks = chunks_of((await served.post("/v3/completions", **body)).text)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


async def test_continuous_usage_counts_on_every_chunk(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = GREEDY | {"prompt": "hello", "max_tokens": 3, "stream": True, "stream_options": options}
    chunks = chunks_of((await served.post("/v1/completions", **body)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_several_prompts_and_n_fan_out_in_order(served: Served) -> None:
    body = GREEDY | {"prompt": ["one", token_ids("two")], "n": 2, "max_tokens": 3}
    answer = (await served.post("/v1/completions", **body)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    alone = [await served.text("/v1/completions", **GREEDY, prompt=p, max_tokens=3) for p in ("one", "two")]
    assert texts == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 12


async def test_best_of_on_v1_returns_the_most_probable_of_so_many(served: Served) -> None:
    body = {"model": "m", "prompt": ["one", "two"], "seed": 3, "temperature": 1, "max_tokens": 6}
    all_of_them = (await served.post("/v1/completions", **body, n=5, logprobs=0)).json()["choices"]
    best: list[str] = []
    for choices in (all_of_them[:5], all_of_them[5:]):
        ranked = sorted(choices, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
        best += [choice["text"] for choice in ranked[:2]]
    answer = (await served.post("/v1/completions", **body, n=2, best_of=5)).json()
    assert [choice["text"] for choice in answer["choices"]] == best
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == 2 * 5 * 6


async def test_streams_fan_out_too(served: Served) -> None:
    body = GREEDY | {"prompt": ["one", "two"], "n": 2, "max_tokens": 3}
    whole = (await served.post("/v1/completions", **body)).json()
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks_of((await served.post("/v1/completions", **body, stream=True)).text):
        texts[chunk["choices"][0]["index"]] += piece_of(chunk)
    assert list(texts.values()) == [choice["text"] for choice in whole["choices"]]


async def test_one_prompt_as_text_or_tokens_is_one(served: Served) -> None:
    forms: list[Any] = ["hello", ["hello"], token_ids("hello"), [token_ids("hello")]]
    texts = {await served.text("/v3/completions", **GREEDY, prompt=form, max_tokens=5) for form in forms}
    assert len(texts) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", token_ids("hello")])
async def test_echo_puts_the_prompt_in_front(served: Served, prompt: Any, stream: bool) -> None:
    body = GREEDY | {"prompt": prompt, "max_tokens": 3}
    plain = await served.text("/v3/completions", **body)
    assert await served.text("/v3/completions", **body, echo=True, stream=stream) == f"hello{plain}"


async def test_echo_alone_gives_the_prompt(served: Served) -> None:
    answer = (await served.post("/v3/completions", **GREEDY, prompt="hello", max_tokens=0, echo=True)).json()
    assert answer["choices"][0]["text"] == "hello"
    assert answer["usage"]["completion_tokens"] == 0


async def test_completion_logprobs(served: Served) -> None:
    body = GREEDY | {"prompt": "hello", "max_tokens": 3, "logprobs": 2}
    logprobs = (await served.post("/v3/completions", **body)).json()["choices"][0]["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert logprobs["text_offset"] == [0, 1, 2]
    for token, logprob, top in zip(*list(logprobs.values())[:3], strict=True):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())


async def test_logprobs_zero_gives_the_chosen_token_alone(served: Served) -> None:
    body = GREEDY | {"prompt": "hello", "max_tokens": 2, "logprobs": 0}
    logprobs = (await served.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]


async def test_echo_with_logprobs_scores_the_prompt(served: Served) -> None:
    body = GREEDY | {"prompt": token_ids("hello"), "max_tokens": 1, "logprobs": 1, "echo": True}
    logprobs = (await served.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:5] == list("hello")
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"] == list(range(6))


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"logprobs": 2, "echo": True}])
async def test_streamed_logprobs_are_those_of_the_whole(served: Served, fields: dict[str, Any]) -> None:
    body = GREEDY | {"prompt": "hello", "max_tokens": 4} | fields
    whole = (await served.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
    chunks = chunks_of((await served.post("/v1/completions", **body, stream=True)).text)
    for key, values in whole.items():
        assert [value for chunk in chunks for value in chunk["choices"][0]["logprobs"][key]] == values


async def test_chat_logprobs(served: Served) -> None:
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    content = (await served.post("/v3/chat/completions", **body)).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    for token in content:
        assert token["bytes"] == list(token["token"].encode())
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert len(token["top_logprobs"]) == 3


async def test_prompt_logprobs_are_vllms(served: Served) -> None:
    body = GREEDY | {"prompt": "hello", "max_tokens": 1, "prompt_logprobs": 1}
    prompt = (await served.post("/v1/completions", **body)).json()["choices"][0]["prompt_logprobs"]
    assert prompt[0] is None
    assert prompt[1][str(ord("e"))]["decoded_token"] == "e"
    assert all(entry["rank"] >= 1 for entries in prompt[1:] for entry in entries.values())


async def test_a_stop_string_is_cut_off_and_named(served: Served) -> None:
    full = await served.text("/v3/completions", **GREEDY, prompt="hello", max_tokens=12)
    stop = full[5:8]
    cut = full[: full.index(stop)]
    body = GREEDY | {"prompt": "hello", "max_tokens": 12, "stop": stop}
    choice = (await served.post("/v1/completions", **body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
    assert await served.text("/v1/completions", **body, stream=True) == cut
    assert await served.text("/v3/completions", **body) == cut
    assert await served.text("/v3/completions", **body, include_stop_str_in_output=True) == cut + stop
    assert await served.text("/v3/completions", **body, stream=True) == cut + stop


async def test_the_end_of_the_sequence_is_no_text() -> None:
    async with serving(FakeModels(runner=lambda: FakeRunner(ends_after=lambda context: len(context) >= 8))) as served:
        choice = (await served.post("/v3/completions", **GREEDY, prompt="hello")).json()["choices"][0]
        assert (len(choice["text"]), choice["finish_reason"]) == (3, "stop")
        for path in ("/v1/completions", "/v3/completions"):
            assert await served.text(path, **GREEDY, prompt="hello", stream=True) == choice["text"]


@pytest.mark.parametrize("path", ["/v3/completions", "/v1/completions"])
@pytest.mark.parametrize("seed", range(4))
async def test_streamed_and_whole_are_one_text(served: Served, path: str, seed: int) -> None:
    body = {"model": "m", "prompt": f"prompt {seed}", "seed": seed, "max_tokens": 20 + seed, "temperature": 1.2}
    assert await served.text(path, **body, stream=True) == await served.text(path, **body)


async def test_top_k_is_40_on_v3_only() -> None:
    seen: list[int] = []
    runner = FakeRunner(
        num_blocks=1024, before_step=lambda chunks: seen.extend(c.sequence.request.sampling.top_k for c in chunks)
    )
    async with serving(FakeModels(runner=lambda: runner)) as served:
        seen.clear()
        for path, fields, top_k in (
            ("/v3/completions", {}, 40),
            ("/v3/completions", {"top_k": -1}, 0),
            ("/v3/completions", {"top_k": 7}, 7),
            ("/v1/completions", {}, 0),
        ):
            await served.text(path, model="m", prompt="hi", max_tokens=1, **fields)
            assert seen.pop() == top_k


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"text": "hi"}, token_ids("hi")),
        ({"text": ["hi", "you"]}, [token_ids("hi"), token_ids("you")]),
        ({"text": "hello", "max_length": 2}, token_ids("he")),
        ({"text": ""}, []),
    ],
)
async def test_v3_tokenize(served: Served, fields: dict[str, Any], tokens: list[Any]) -> None:
    assert (await served.post("/v3/tokenize", model="m", **fields)).json() == {"tokens": tokens}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text field is required"),
        ({"text": 5}, "text should be string or array of strings"),
        ({"text": "a", "max_length": "x"}, "max_length should be integer"),
        ({"text": "a", "add_special_tokens": "x"}, "add_special_tokens should be boolean"),
        ({"text": "a", "pad_to_max_length": "x"}, "pad_to_max_length should be boolean"),
        ({"text": "a", "padding_side": "up"}, "padding_side should be either left or right"),
    ],
)
async def test_v3_tokenize_refuses(served: Served, fields: dict[str, Any], message: str) -> None:
    response = await served.post("/v3/tokenize", model="m", **fields)
    assert response.status_code == 400
    assert response.json()["error"].endswith(message)


async def test_v1_tokenize(served: Served) -> None:
    answer = (await served.post("/v1/tokenize", prompt="hi", return_token_strs=True)).json()
    assert answer == {"count": 2, "max_model_len": 512, "tokens": token_ids("hi"), "token_strs": ["h", "i"]}
    chat = (await served.post("/v1/tokenize", model="m", messages=MESSAGES)).json()
    assert chat["tokens"] == token_ids("<user>hi<a>")
    assert (await served.post("/v1/tokenize", model="m")).json()["error"]["param"] == "prompt"


async def test_template_variables_reach_the_template() -> None:
    template = "{{ messages[0].content }}|{{ tools | length if tools else 0 }}|{{ extra }}|{{ add_generation_prompt }}"
    async with serving(FakeModels(template=template)) as served:
        body = {
            "messages": MESSAGES,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "chat_template_kwargs": {"extra": "yes"},
            "max_tokens": 1,
        }
        usage = (await served.post("/v1/chat/completions", **body)).json()["usage"]
        assert usage["prompt_tokens"] == len("hi|1|yes|True")
        usage = (await served.post("/v1/chat/completions", **body, tool_choice="none")).json()["usage"]
        assert usage["prompt_tokens"] == len("hi|0|yes|True")
