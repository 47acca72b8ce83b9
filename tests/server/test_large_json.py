from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_lora.server.large_json import dump_json
from tests.server.test_hostile_fields import JSON


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5))
def test_it_is_what_pythons_encoder_writes(document: dict[str, Any]) -> None:
    assert json.loads(dump_json(document)) == document


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 10_000])
def test_long_lists_are_whole(length: int) -> None:
    document = {"tokens": list(range(length)), "lists": [[*range(length)], [], {"a": [None] * length}], "b": {}}
    assert dump_json(document) == json.dumps(document, separators=(",", ":")).encode()


def test_text_stays_text() -> None:
    assert dump_json({"ä": "漢字😀\n"}) == '{"ä":"漢字😀\\n"}'.encode()


def test_there_is_no_infinity() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"x": math.inf})
