"""Whatever a client writes into a field: an answer or a typed refusal, never a fault of ours."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.core.errors import InvalidFieldError, MalformedBodyError
from ovms_lora.engine.model import GenerationDefaults
from ovms_lora.server import v1_fields, v3_fields
from ovms_lora.server.body import parse_object
from ovms_lora.server.fields import ModelLimits, Table
from ovms_lora.server.sampling import SamplingDefaults, sampling_params
from tests.server.serving import Served

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TABLES = [
    (v3_fields.COMPLETIONS, v3_fields.DEFAULTS),
    (v3_fields.CHAT, v3_fields.DEFAULTS),
    (v1_fields.COMPLETIONS, v1_fields.DEFAULTS),
    (v1_fields.CHAT, v1_fields.DEFAULTS),
]
REQUIRED = {"prompt": "hi", "messages": [{"role": "user"}]}


@pytest.mark.parametrize(("table", "defaults"), TABLES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_fields_are_taken_or_refused(table: Table, defaults: SamplingDefaults, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(table.names)), max_size=3, unique=True))
    document: dict[str, Any] = REQUIRED | {name: data.draw(JSON) for name in names}
    try:
        values = table.read(document, ModelLimits(max_tokens_limit=100))
        sampling_params(values, GenerationDefaults(), defaults)
    except InvalidFieldError as refusal:
        assert refusal.message
        assert refusal.param


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_bodies_are_taken_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except MalformedBodyError as refusal:
        assert refusal.message


@pytest.mark.anyio
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 1e-308},
        {"repetition_penalty": -1},
        {"length_penalty": -1e308},
        {"temperature": 1e-308},
        {"temperature": 1e-9, "top_p": 1e-300},
        {"top_k": 2**70},
        {"min_p": 0.999999999},
        {"seed": 2**32 - 1},
        {"max_tokens": 2**32 - 1},
        {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1e30},
        {"temperature": 10**400},
        {"stop": ["\x00", "😀" * 256]},
        {"prompt": "\x00\u202e\ufffe"},
        {"prompt": "<|endoftext|></s>"},
        {"prompt": [256] * 10},
    ],
)
@pytest.mark.parametrize("path", ["/v3/completions", "/v1/completions"])
async def test_extremes_are_no_faults(served: Served, path: str, fields: dict[str, Any]) -> None:
    body = {"model": "m", "prompt": "hello", "max_tokens": 3} | fields
    response = await served.client.post(path, json=body)
    assert response.status_code in (200, 400), response.text
    assert await served.text(path, model="m", prompt="hello", max_tokens=2)
