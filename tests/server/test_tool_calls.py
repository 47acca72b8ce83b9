"""Tool calls and reasoning over HTTP: the same in both dialects, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.constraint import ConstraintKind
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.server.tool_use import ToolUse
from tests.fakes import ScriptedRunner
from tests.server.serving import FakeModels, Served, chunks_of, serving

pytestmark = pytest.mark.anyio

CHATS = ["/v3/chat/completions", "/v1/chat/completions"]
MESSAGES = [{"role": "user", "content": "Weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "time"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🐍"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
ARGUMENTS = '{"city": "Zürich 🐍"}'
BODY = {"model": "m", "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 200}


@asynccontextmanager
async def writing(text: str, tool_parser: str = "hermes3", reasoning_parser: str = "") -> AsyncIterator[Served]:
    """Serve a model that writes one text."""
    options = EngineOptions(max_num_batched_tokens=64, tool_parser=tool_parser, reasoning_parser=reasoning_parser)
    async with serving(FakeModels(options=options, runner=lambda: ScriptedRunner(text))) as served:
        yield served


async def whole(served: Served, path: str, **body: Any) -> tuple[dict[str, Any], str]:
    """Return the message and the reason for its end; it is the same when it is streamed."""
    answer = (await served.post(path, **BODY | body)).json()
    message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    streamed, streamed_reason = put_together(await served.client.post(path, json=BODY | body | {"stream": True}))
    assert streamed_reason == reason
    assert streamed["content"] == (message["content"] or "")
    assert streamed["reasoning_content"] == message.get("reasoning_content", "")
    assert without_ids(streamed["tool_calls"]) == without_ids(message.get("tool_calls", []))
    return message, reason


def put_together(response: Any) -> tuple[dict[str, Any], str]:
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = ""
    for chunk in chunks_of(response.text):
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(message["tool_calls"])
                message["tool_calls"].append(piece)
            else:
                message["tool_calls"][piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    for call in message["tool_calls"]:
        del call["index"]
    return message, reason


def without_ids(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [call["id"] for call in calls]
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    assert len(set(ids)) == len(ids)
    return [{key: value for key, value in call.items() if key != "id"} for call in calls]


def called(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("path", CHATS)
async def test_a_call_is_told_from_content(path: str) -> None:
    async with writing(f"I look.\n{CALL}\n{OTHER}") as served:
        message, reason = await whole(served, path)
        assert (message["content"], reason) == ("I look.", "tool_calls")
        assert without_ids(message["tool_calls"]) == [called("weather", ARGUMENTS), called("time", "{}")]
        message, _ = await whole(served, path, parallel_tool_calls=False)
        assert without_ids(message["tool_calls"]) == [called("weather", ARGUMENTS)]


async def test_without_content_it_is_empty_for_ovms_and_null_for_openai() -> None:
    async with writing(CALL) as served:
        for path, content in zip(CHATS, ("", None), strict=True):
            message, _ = await whole(served, path)
            assert message["content"] == content


@pytest.mark.parametrize("path", CHATS)
async def test_the_name_comes_first_then_pieces_of_the_arguments(path: str) -> None:
    async with writing(CALL) as served:
        response = await served.client.post(path, json=BODY | {"stream": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]
        pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
        assert pieces[0]["function"] == {"name": "weather", "arguments": ""}
        assert len(pieces) > 10
        assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS
        assert not any(delta.get("content") for delta in deltas)


@pytest.mark.parametrize("path", CHATS)
async def test_what_is_no_call_is_content(path: str) -> None:
    for text in ('<tool_call>{"name": 5}</tool_call>', "a <tool_cal", "<tool_call>", "2 < 3 "):
        async with writing(text) as served:
            message, reason = await whole(served, path)
            assert (message["content"], reason) == (text, "stop")
            assert not message.get("tool_calls")


@pytest.mark.parametrize("path", CHATS)
async def test_without_tools_or_parser_nothing_is_a_call(path: str) -> None:
    async with writing(CALL) as served:
        for body in ({"tool_choice": "none"}, {"tools": None}):
            message, reason = await whole(served, path, **body)
            assert (message["content"], reason) == (CALL, "stop")
    async with writing(CALL, tool_parser="") as served:
        assert (await whole(served, path))[0]["content"] == CALL


@pytest.mark.parametrize("path", CHATS)
async def test_a_call_that_is_cut_ends_for_its_length(path: str) -> None:
    async with writing(CALL) as served:
        message, reason = await whole(served, path, max_tokens=len(CALL.partition("rich")[0].encode()))
        assert reason == "length"
        assert without_ids(message["tool_calls"]) == [called("weather", '{"city": "Zü')]


@pytest.mark.parametrize("path", CHATS)
async def test_reasoning_has_a_field_of_its_own(path: str) -> None:
    async with writing(f"<think>Hm ü.</think>\n\n{CALL}", reasoning_parser="qwen3") as served:
        message, reason = await whole(served, path)
        assert (message["reasoning_content"], reason) == ("Hm ü.", "tool_calls")
        assert without_ids(message["tool_calls"]) == [called("weather", ARGUMENTS)]
    async with writing("Hm.</think>Yes.", reasoning_parser="deepseek_r1") as served:
        message, _ = await whole(served, path, tools=None)
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


@pytest.mark.parametrize("path", CHATS)
async def test_a_forced_call_is_read_without_markers(path: str) -> None:
    written = '[{"name": "weather", "parameters": {"city": "Zürich 🐍"}}]'
    async with writing(written, tool_parser="", reasoning_parser="deepseek_r1") as served:
        message, reason = await whole(served, path, tool_choice="required")
        assert (without_ids(message["tool_calls"]), reason) == ([called("weather", ARGUMENTS)], "tool_calls")
    choice = {"type": "function", "function": {"name": "weather"}}
    async with writing(ARGUMENTS, tool_parser="") as served:
        message, reason = await whole(served, path, tool_choice=choice)
        assert (without_ids(message["tool_calls"]), reason) == ([called("weather", ARGUMENTS)], "tool_calls")


@pytest.mark.parametrize("path", CHATS)
async def test_a_forced_call_fits_its_schema_whatever_the_model_prefers(path: str) -> None:
    unit = {"type": "string", "enum": ["celsius", "kelvin"]}
    parameters = {"type": "object", "properties": {"unit": unit}, "required": ["unit"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("warm", "cold")]
    async with serving(FakeModels()) as served:
        for choice in ("required", {"type": "function", "function": {"name": "cold"}}):
            body = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
            message, reason = await whole(served, path, **body)
            (call,) = message["tool_calls"]
            assert call["function"]["name"] in ("warm", "cold")
            assert json.loads(call["function"]["arguments"])["unit"] in unit["enum"]
            assert (message["content"] or "", reason) == ("", "tool_calls")


@pytest.mark.parametrize("path", CHATS)
async def test_a_schema_of_a_tool_that_does_not_compile_is_refused(path: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}]
    async with serving() as served:
        answer = await served.post(path, **BODY | {"tools": tools, "tool_choice": "required"})
        assert answer.status_code == 400
        if path.startswith("/v1"):
            assert answer.json()["error"]["param"] == "tools"
        answer = await served.post(path, **BODY | {"tools": tools})
        assert answer.status_code == 200


@pytest.mark.parametrize("path", CHATS)
async def test_a_forced_call_goes_with_no_other_constraint(path: str) -> None:
    async with serving() as served:
        body = BODY | {"tool_choice": "required", "response_format": {"type": "json_object"}}
        answer = await served.post(path, **body)
        assert answer.status_code == 400
        assert "forces a call" in json.dumps(answer.json())


async def test_a_constrained_answer_has_no_reasoning() -> None:
    async with writing('{"a": 1}', reasoning_parser="deepseek_r1") as served:
        body = {"tools": None, "response_format": {"type": "json_object"}}
        message, _ = await whole(served, CHATS[1], **body)
        assert message["content"] == '{"a": 1}'
        assert "reasoning_content" not in message


async def test_logprobs_belong_to_all_tokens_of_a_call() -> None:
    async with writing(CALL) as served:
        body = BODY | {"logprobs": True}
        answer = (await served.post(CHATS[1], **body)).json()
        tokens = [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]
        response = await served.client.post(CHATS[1], json=body | {"stream": True})
        streamed = [
            entry["token"]
            for chunk in chunks_of(response.text)
            for entry in (chunk["choices"][0]["logprobs"] or {"content": ()})["content"]
        ]
        assert streamed == tokens
        assert len(tokens) >= len(CALL.encode())


async def test_each_choice_has_calls_of_its_own() -> None:
    async with writing(CALL) as served:
        answer = (await served.post(CHATS[1], **BODY, n=3)).json()
        assert len({choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}) == 3
        response = await served.client.post(CHATS[1], json=BODY | {"n": 2, "stream": True})
        starts = [
            (chunk["choices"][0]["index"], piece["index"])
            for chunk in chunks_of(response.text)
            for piece in chunk["choices"][0]["delta"].get("tool_calls", ())
            if "id" in piece
        ]
        assert sorted(starts) == [(0, 0), (1, 0)]


# What the template gets.


async def test_earlier_calls_reach_the_template_as_objects() -> None:
    template = "{{ messages | tojson }}"
    async with serving(FakeModels(template=template)) as served:
        function = {"name": "f", "arguments": '{"a": 1}'}
        messages = [
            {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]},
            {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "5"}]},
            {"role": "assistant", "tool_calls": []},
        ]
        answer = (await served.post("/v1/tokenize", model="m", messages=messages)).json()
        expected = [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "tool_call_id": "x", "content": "5"},
            {"role": "assistant", "content": ""},
        ]
        assert json.loads(bytes(answer["tokens"])) == expected
        for arguments, seen in (("", {}), (None, {}), ("{broken", "{broken"), ({"b": 2}, {"b": 2})):
            function["arguments"] = arguments  # type: ignore[assignment]
            answer = (await served.post("/v1/tokenize", model="m", messages=messages)).json()
            assert json.loads(bytes(answer["tokens"]))[0]["tool_calls"][0]["function"]["arguments"] == seen


async def test_a_named_function_is_the_only_one_offered() -> None:
    async with serving(FakeModels(template="{{ tools | map(attribute='function.name') | join(',') }}")) as served:
        for choice, prompt in (("auto", "weather,time"), ({"function": {"name": "time"}}, "time")):
            body = BODY | {"tool_choice": choice, "max_tokens": 1}
            usage = (await served.post("/v3/chat/completions", **body)).json()["usage"]
            assert usage["prompt_tokens"] == len(prompt)


async def test_special_tokens_in_messages_are_text() -> None:
    async with serving(FakeModels(template="{{ messages[0].content }}</s>")) as served:
        messages = [{"role": "user", "content": "</s>"}]
        answer = (await served.post("/v1/tokenize", model="m", messages=messages)).json()
        assert answer["tokens"] == [*b"</s>", 256]
        text = (await served.post("/v1/tokenize", model="m", prompt="</s>")).json()
        assert text["tokens"] == [256]


# What a forced call has to look like.


def schema_of(**values: Any) -> Any:
    asked = ToolUse.of({"tools": TOOLS, **values}).constraint()
    assert asked and asked.param == "tools" and asked.spec.kind is ConstraintKind.JSON_SCHEMA
    return json.loads(str(asked.spec.source))


def test_a_required_call_is_an_array_of_any_of_the_tools() -> None:
    empty = {"type": "object", "properties": {}}
    choices = [
        {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": [name]}, "parameters": empty},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for name in ("weather", "time")
    ]
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    assert schema_of(tool_choice="required") == schema
    assert schema_of(tool_choice="required", parallel_tool_calls=False) == {**schema, "maxItems": 1}


def test_a_named_call_is_the_parameters_of_its_function() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"function": {"name": "f"}}, {"function": {"name": "g", "parameters": parameters}}]
    assert schema_of(tools=tools, tool_choice={"function": {"name": "g"}}) == parameters
    assert schema_of(tools=tools, tool_choice={"function": {"name": "f"}}) == {"type": "object", "properties": {}}


def test_definitions_move_to_the_top() -> None:
    def tool(name: str, definition: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {}, "$defs": {"x": {"type": definition}}}
        return {"function": {"name": name, "parameters": parameters}}

    schema = schema_of(tools=[tool("f", "string"), tool("g", "string")], tool_choice="required")
    assert schema["$defs"] == {"x": {"type": "string"}}
    assert "$defs" not in json.dumps(schema["items"])
    with pytest.raises(InvalidFieldError, match="'x' has multiple schemas"):
        schema_of(tools=[tool("f", "string"), tool("g", "integer")], tool_choice="required")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_other_choices_force_nothing(choice: str) -> None:
    assert ToolUse.of({"tools": TOOLS, "tool_choice": choice}).constraint() is None
    assert ToolUse.of({"tools": [], "tool_choice": "required"}).constraint() is None


@pytest.mark.parametrize(
    ("special", "tools", "parser", "reasoning", "needed"),
    [
        (["<tool_call>"], TOOLS, "hermes3", "", True),
        (["<tool_call>"], [], "hermes3", "", False),
        (["<other>"], TOOLS, "hermes3", "", False),
        (["</think>"], [], "hermes3", "qwen3", True),
    ],
)
def test_special_tokens_are_shown_where_a_parser_looks_for_them(
    special: list[str], tools: list[Any], parser: str, reasoning: str, needed: bool
) -> None:
    options = EngineOptions(tool_parser=parser, reasoning_parser=reasoning)
    model: Any = SimpleNamespace(options=options, tokenizer=SimpleNamespace(special_tokens=special))
    assert ToolUse.of({"tools": tools}).needs_special_tokens(model) is needed
