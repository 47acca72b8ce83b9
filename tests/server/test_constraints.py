"""Structured output over HTTP: the form of the fields, what answers hold, and that compiling holds nobody up."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from typing import Any

import jsonschema
import pytest

from ovms_lora.server.errors import OVMS_PREFIX
from tests.server.serving import Served, chunks_of, piece_of, serving

pytestmark = pytest.mark.anyio

BASE: dict[str, Any] = {"model": "m", "prompt": "hello", "max_tokens": 200, "temperature": 0}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXT_TYPES = "response_format.type must be one of text, json_object, json_schema"
NO_SCHEMA = "When response_format type is 'json_schema', the 'json_schema' field must be provided."
NONE = "You must use one kind of structured outputs constraint but none are specified"
MULTIPLE = "You can only use one kind of structured outputs constraint but multiple are specified"


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


RESPONSE_FORMAT_REFUSED: list[tuple[Any, str]] = [
    ("json_object", "response_format is not an object"),
    ([], "response_format is not an object"),
    ({}, TEXT_TYPES),
    ({"type": None}, TEXT_TYPES),
    ({"type": "regex", "pattern": "a"}, TEXT_TYPES),
    ({"type": "json_schema"}, NO_SCHEMA),
    ({"type": "json_schema", "json_schema": None}, NO_SCHEMA),
    ({"type": "json_schema", "json_schema": []}, "response_format.json_schema is not an object"),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema is not an object"),
    (json_schema("{}"), "response_format.json_schema.schema is not an object"),
    (json_schema({}, name=5), "response_format.json_schema.name is not a string"),
    (json_schema({"type": "strin"}), "response_format does not compile: Invalid type: strin"),
    (json_schema({"not": {}}), 'response_format does not compile: Unimplemented keys: ["not"]'),
    (json_schema({"$ref": "#/x"}), "response_format does not compile: Pointer '/x' does not exist"),
    (json_schema({"$ref": "#"}), "response_format does not compile: no text matches it"),
    (json_schema({"multipleOf": 1e-9 + 1}), "response_format does not compile: multipleOf is supported up to 10000"),
]

STRUCTURED_OUTPUTS_REFUSED: list[tuple[Any, str]] = [
    ("json", "structured_outputs is not an object"),
    ({}, NONE),
    ({"json": None}, NONE),
    ({"disable_any_whitespace": False}, NONE),
    ({"regex": "a", "choice": ["a"]}, MULTIPLE),
    ({"json_object": True, "json": {}}, MULTIPLE),
    ({"json": 5}, "structured_outputs.json is not an object or a string"),
    ({"json": "{"}, "structured_outputs does not compile: it is not JSON"),
    ({"json": '["a"]'}, "structured_outputs does not compile: it is not a JSON object"),
    ({"json": "[" * 10_000}, "structured_outputs does not compile: it nests deeper than 100 levels"),
    ({"json_object": False}, "structured_outputs.json_object must be true"),
    ({"regex": 5}, "structured_outputs.regex is not a string"),
    ({"regex": ""}, "structured_outputs.regex must not be empty"),
    ({"regex": "("}, "structured_outputs does not compile: unclosed group"),
    ({"regex": "a" * 9000}, "structured_outputs does not compile: it is larger than 8192 bytes"),
    ({"choice": "yes"}, "structured_outputs.choice is not an array of strings"),
    ({"choice": ["yes", 1]}, "structured_outputs.choice is not an array of strings"),
    ({"choice": []}, "structured_outputs.choice must not be empty"),
    ({"grammar": {}}, "structured_outputs.grammar is not a string"),
    ({"grammar": "root ::= foo"}, "structured_outputs does not compile: Failed to convert"),
    ({"structural_tag": "{}"}, "structured_outputs.structural_tag is not supported"),
    ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern is not supported"),
    ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace is not supported"),
    ({"regex": "a", "lark\n": "b"}, "structured_outputs.lark\\n is not supported"),
]


@pytest.mark.parametrize("path", ["/v3/completions", "/v3/chat/completions"])
@pytest.mark.parametrize(("value", "message"), RESPONSE_FORMAT_REFUSED)
async def test_v3_refuses_a_response_format(shared: Served, path: str, value: Any, message: str) -> None:
    body = CHAT if "chat" in path else BASE
    response = await shared.post(path, **body, response_format=value)
    assert response.status_code == 400
    assert response.json()["error"].startswith(OVMS_PREFIX + message)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("param", "value", "message"),
    [
        *(("response_format", *row) for row in RESPONSE_FORMAT_REFUSED),
        *(("structured_outputs", *row) for row in STRUCTURED_OUTPUTS_REFUSED),
    ],
)
async def test_v1_refuses(shared: Served, path: str, param: str, value: Any, message: str) -> None:
    body = CHAT if "chat" in path else BASE
    for stream in (False, True):
        response = await shared.post(path, **body, stream=stream, **{param: value})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "BadRequestError")
        assert error["message"].startswith(message)


async def test_v1_refuses_both_fields_at_once(shared: Served) -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    response = await shared.post("/v1/completions", **BASE, **both)
    assert (response.status_code, response.json()["error"]["message"]) == (400, MULTIPLE)


NO_CONSTRAINT: list[dict[str, Any]] = [
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "text"}, "structured_outputs": None},
]


@pytest.mark.parametrize("fields", NO_CONSTRAINT)
async def test_without_a_constraint_any_text_may_come(shared: Served, fields: dict[str, Any]) -> None:
    plain = await shared.text("/v1/completions", **BASE)
    assert await shared.text("/v1/completions", **BASE, **fields) == plain


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v3/completions", "/v3/chat/completions", "/v1/completions", "/v1/chat/completions"])
async def test_an_answer_follows_its_schema(shared: Served, path: str, stream: bool) -> None:
    body = CHAT if "chat" in path else BASE
    text = await shared.text(path, **body, stream=stream, response_format=json_schema(PERSON, strict=True))
    jsonschema.validate(json.loads(text), PERSON)


STRUCTURED: list[tuple[dict[str, Any], str]] = [
    ({"json": PERSON}, r'\{.*"age".*\}'),
    ({"json": json.dumps(PERSON)}, r'\{.*"age".*\}'),
    ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
    ({"choice": ["yes", "no"]}, "yes|no"),
    ({"grammar": 'root ::= "a" "b"'}, "ab"),
    ({"grammar": 'start: "a" "b"'}, "ab"),
    ({"regex": "ab", "disable_fallback": False, "whitespace_pattern": None}, "ab"),
]


@pytest.mark.parametrize(("value", "pattern"), STRUCTURED)
async def test_every_kind_of_structured_output(shared: Served, value: dict[str, Any], pattern: str) -> None:
    answer = (await shared.post("/v1/completions", **BASE, n=2, structured_outputs=value)).json()
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"], re.DOTALL)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


async def test_a_json_object_that_is_cut_has_no_end(shared: Served) -> None:
    body = BASE | {"max_tokens": 3, "response_format": {"type": "json_object"}}
    choice = (await shared.post("/v3/completions", **body)).json()["choices"][0]
    assert choice["text"].startswith("{")
    assert choice["finish_reason"] == "length"


async def test_a_stream_says_in_its_last_chunk_that_the_text_is_complete(shared: Served) -> None:
    body = BASE | {"stream": True, "structured_outputs": {"regex": "[a-z]{4}"}}
    chunks = chunks_of((await shared.post("/v1/completions", **body)).text)
    assert len("".join(map(piece_of, chunks))) == 4
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_text_that_cannot_follow_its_grammar_is_a_400_too(shared: Served) -> None:
    grammar = 'root ::= "b" x\nx ::= "a" x'
    response = await shared.post("/v1/completions", **BASE, structured_outputs={"grammar": grammar})
    assert response.status_code == 400
    assert "the text cannot follow its constraint any more" in response.json()["error"]["message"]


async def longest_pause(work: asyncio.Task[Any]) -> float:
    """Return the longest time, in seconds, for which the event loop did nothing else until `work` was done."""
    longest, last = 0.0, time.perf_counter()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last - 0.001), now
    return longest


LARGE: dict[str, dict[str, Any]] = {
    "many definitions": {
        "$defs": {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1000)}
        | {"d1000": {"type": "string"}},
        "$ref": "#/$defs/d0",
    },
    "a large enum": {"enum": [f"value {i}" for i in range(7000)]},
    "a thousand properties": {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
}


@pytest.mark.parametrize("name", LARGE)
async def test_the_event_loop_goes_on_while_a_large_schema_compiles(name: str) -> None:
    async with serving() as served:
        pauses = []
        for number in range(4):  # a machine that does something else may stop the loop once
            schema = {**LARGE[name], "title": str(number)}  # another one each time: compiled ones are kept
            body = BASE | {"max_tokens": 1, "response_format": json_schema(schema)}
            first = asyncio.create_task(served.post("/v3/completions", **body))
            pauses.append(await longest_pause(first))
            assert (await first).status_code == 200
        assert min(pauses) < 0.05


async def test_a_small_regular_expression_compiles_off_the_event_loop_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model,) = served.state.registry.served
    threads: list[str] = []
    compile_ = type(model.model.constraints).compile

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_(*args, **kwargs)

    monkeypatch.setattr(type(model.model.constraints), "compile", noted)
    for _ in range(2):
        assert await served.text("/v1/completions", **BASE, structured_outputs={"regex": "abc"}) == "abc"
    assert threads == ["grammars_0"]
