"""Which adapters a request names, for the router."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ovms_lora.scale.adapter_key import adapter_key


def key(document: Any, path: str = "/v1/completions", method: str = "POST") -> str:
    return adapter_key(method, path, document if isinstance(document, bytes) else json.dumps(document).encode())


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"model": "sql"}, "sql"),
        ({"model": "base:sql"}, "sql"),
        ({"model": "base", "lora": [{"alias": "b"}, {"alias": "a", "alpha": 0.5}]}, "a,b"),
        ({"model": "base", "lora": []}, "base"),
        ({"model": "org/base"}, ""),
        ({"model": "a,b"}, ""),
        ({"model": ""}, ""),
        ({"model": 3}, ""),
        ({"model": "base", "lora": [{"alias": f"a{number}"} for number in range(17)]}, ""),
        ({}, ""),
        ([], ""),
        (b"{", ""),
        (b"", ""),
    ],
)
def test_the_key_of_a_body(document: Any, expected: str) -> None:
    assert key(document) == expected


@pytest.mark.parametrize("path", ["/v3/chat/completions", "/v1/chat/completions", "/v3/completions", "/v1/tokenize"])
def test_all_routes_that_use_adapters_have_one(path: str) -> None:
    assert key({"model": "sql"}, path) == "sql"


def test_an_adapter_is_unloaded_where_it_is() -> None:
    assert key({"lora_name": "sql"}, "/v1/unload_lora_adapter") == "sql"


def test_other_routes_have_none() -> None:
    assert key({"model": "sql"}, "/v1/load_lora_adapter") == ""
    assert key({"model": "sql"}, method="GET") == ""
