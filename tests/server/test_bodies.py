"""What is wrong with a body as a whole."""

from __future__ import annotations

import pytest

from ovms_lora.core.errors import MalformedBodyError
from ovms_lora.server.body import MAX_NESTING, parse_object
from tests.server.serving import Served

pytestmark = pytest.mark.anyio

NOT_JSON = "Cannot parse JSON body"
TOO_DEEP = "JSON body exceeds maximum nesting depth"

MALFORMED: list[tuple[bytes, str]] = [
    (b"", NOT_JSON),
    (b"{", NOT_JSON),
    (b'{"model": "m",}', NOT_JSON),
    (b'{"model": "m", "temperature": NaN}', NOT_JSON),
    (b'{"model": "m", "temperature": -Infinity}', NOT_JSON),
    (b'{"model": "\xff"}', NOT_JSON),
    (b'{"model": "\\ud800"}', NOT_JSON),
    (b'{"model": "m", "seed": ' + b"1" * 5000 + b"}", NOT_JSON),
    (b"[]", "JSON body must be an object"),
    (b'"m"', "JSON body must be an object"),
    (b"null", "JSON body must be an object"),
    (b'{"model": "m", "x": ' + b"[" * 100 + b"]" * 100 + b"}", TOO_DEEP),
    (b'{"model": "m", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", TOO_DEEP),
    (b"[" * 200_000, TOO_DEEP),
    (b"{}", "model field is missing in JSON body"),
    (b'{"model": null}', "model field is not a string"),
    (b'{"model": 1}', "model field is not a string"),
    (b'{"model": "m", "stream": null}', "stream field is not a boolean"),
    (b'{"model": "m", "stream": 1}', "stream field is not a boolean"),
    (b'{"model": "m", "stream": "true"}', "stream field is not a boolean"),
]


@pytest.mark.parametrize("path", ["/v3/completions", "/v3/chat/completions", "/v3/tokenize"])
@pytest.mark.parametrize(("body", "detail"), MALFORMED, ids=range(len(MALFORMED)))
async def test_v3_answers_412(shared: Served, path: str, body: bytes, detail: str) -> None:
    response = await shared.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 412
    assert response.json() == {"error": f"The file is not valid json - {detail}"}


async def test_v1_answers_400(shared: Served) -> None:
    response = await shared.client.post("/v1/completions", content=b"{")
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": NOT_JSON,
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


@pytest.mark.parametrize("depth", [MAX_NESTING, MAX_NESTING + 1])
def test_nesting_ends_at_a_hundred(depth: int) -> None:
    body = b'{"x": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    if depth <= MAX_NESTING:
        assert "x" in parse_object(body)
    else:
        with pytest.raises(MalformedBodyError, match=TOO_DEEP):
            parse_object(body)


def test_wide_is_not_deep() -> None:
    assert len(parse_object(b'{"x": [' + b"[1]," * 1000 + b"[1]]}")["x"]) == 1001


@pytest.mark.parametrize("depth", [98, 99])
def test_a_scalar_in_the_innermost_container_does_not_count(depth: int) -> None:
    assert parse_object(b'{"y": ' + b"[" * depth + b"1" + b"]" * depth + b', "z": [' + b"[]," * 20 + b"[]]}")


async def test_escaped_pairs_of_surrogates_are_text(shared: Served) -> None:
    body = b'{"model": "m", "prompt": "\\ud83d\\ude00", "echo": true, "max_tokens": 0}'
    response = await shared.client.post("/v3/completions", content=body)
    assert response.json()["choices"][0]["text"] == "😀"


async def test_other_content_types(shared: Served) -> None:
    body, form = b'{"model": "m", "prompt": "hi"}', {"Content-Type": "application/x-www-form-urlencoded"}
    v3 = await shared.client.post("/v3/completions", content=body, headers=form)
    assert (v3.status_code, v3.json()) == (
        404,
        {"error": "Mediapipe graph definition with requested name is not found"},
    )
    v1 = await shared.client.post("/v1/completions", content=body, headers=form)
    assert (v1.status_code, v1.json()["error"]["type"]) == (415, "UnsupportedMediaTypeError")
    json = {"Content-Type": "application/json; charset=utf-8"}
    assert (await shared.client.post("/v3/completions", content=body, headers=json)).is_success
