"""Files of keys: their two forms, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.errors import UsageError
from ovms_lora.server.keys import ApiKey, digest_of, key_of_environment, plain_keys, read_keys
from ovms_lora.server.tenants import Tenant

SECRET = "s3cret-of-somebody"


def written(folder: Path, content: Any) -> Path:
    path = folder / "keys"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def tenant(**fields: Any) -> dict[str, Any]:
    return {"name": "search", "keys": [SECRET], **fields}


def test_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "one\n\n  two \r\n")
    assert read_keys("--api_key_file", path, tenants=True) == plain_keys("one", "two")


def test_tenants(tmp_path: Path) -> None:
    entries = [tenant(models=["base", "sql", "base:*", "a/b:tools"]), {"name": "shop", "keys": ["x", "y"]}]
    keys = read_keys("--api_key_file", written(tmp_path, {"tenants": entries}), tenants=True)
    search = Tenant("search", frozenset({"base", "sql", "base:*", "a/b:tools"}), 0.5)
    shop = Tenant("shop", None, 0.5)
    assert keys == (ApiKey(digest_of(SECRET), search), ApiKey(digest_of("x"), shop), ApiKey(digest_of("y"), shop))
    assert SECRET not in repr(keys)


@pytest.mark.parametrize("share", [0.01, 1, 1.0])
def test_shares_of_the_queue(tmp_path: Path, share: float) -> None:
    path = written(tmp_path, {"tenants": [tenant(queue_share=share)]})
    assert read_keys("--api_key_file", path, tenants=True)[0].tenant.queue_share == share


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "holds no key"),
        (" \n\n", "holds no key"),
        (f"good\n{SECRET} {SECRET}\n", "line 2 is no key"),
        (f"# {SECRET}\n", "line 1 is no key"),
        (f"ü{SECRET}\n", "line 1 is no key"),
        (f"{SECRET}\n" + "x" * 1025, "line 2 is no key"),
        (f"{SECRET}\n{SECRET}\n", "line 2 repeats a key"),
        (f'["{SECRET}", "x y"]', "line 1 is no key"),
        ("{", "not valid JSON"),
        ('{"tenants": [], "tenants": []}', "the key 'tenants' stands twice"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        ({}, "tenants: is missing"),
        ({"tenants": []}, "tenants: "),
        ({"tenants": {}}, "tenants: "),
        ({"keys": [SECRET], "tenants": [tenant()]}, "keys: unknown key"),
        ({"tenants": [SECRET]}, "tenants.0: "),
        ({"tenants": [{"keys": [SECRET]}]}, "tenants.0.name: is missing"),
        ({"tenants": [{"name": "x"}]}, "tenants.0.keys: is missing"),
        ({"tenants": [tenant(keys=[])]}, "tenants.0.keys: "),
        ({"tenants": [tenant(keys=SECRET)]}, "tenants.0.keys: "),
        ({"tenants": [tenant(keys=["good", f"{SECRET} "])]}, "tenants.0.keys.1: this is no key"),
        ({"tenants": [tenant(keys=[""])]}, "tenants.0.keys.0: this is no key"),
        ({"tenants": [tenant(name="a b")]}, "tenants.0.name: "),
        ({"tenants": [tenant(name="")]}, "tenants.0.name: "),
        ({"tenants": [tenant(), tenant(keys=["other"])]}, "two tenants are named 'search'"),
        ({"tenants": [tenant(), tenant(name="other")]}, "a key stands twice"),
        ({"tenants": [tenant(keys=[SECRET, SECRET])]}, "a key stands twice"),
        ({"tenants": [tenant(models=["a b"])]}, "tenants.0.models.0: "),
        ({"tenants": [tenant(models=["*"])]}, "tenants.0.models.0: "),
        ({"tenants": [tenant(models=["base:"])]}, "tenants.0.models.0: "),
        ({"tenants": [tenant(models="base")]}, "tenants.0.models: "),
        ({"tenants": [tenant(queue_share=0)]}, "tenants.0.queue_share: "),
        ({"tenants": [tenant(queue_share=1.01)]}, "tenants.0.queue_share: "),
        ({"tenants": [tenant(queue_share="0.5")]}, "tenants.0.queue_share: "),
        ({"tenants": [tenant(model=["base"])]}, "tenants.0.model: unknown key"),
    ],
)
def test_what_is_wrong_is_said_without_a_key(tmp_path: Path, content: Any, error: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_keys("--api_key_file", written(tmp_path, content), tenants=True)
    assert error in raised.value.message
    assert raised.value.hint
    assert SECRET not in raised.value.message + raised.value.hint


def test_admins_have_no_tenants(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1 is no key"):
        read_keys("--admin_key_file", written(tmp_path, {"tenants": [tenant()]}), tenants=False)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\n")
    for name in ("missing", ".", "latin"):
        with pytest.raises(UsageError, match="cannot read --api_key_file"):
            read_keys("--api_key_file", tmp_path / name, tenants=True)


def test_the_environment() -> None:
    assert key_of_environment("API_KEY", " secret \n") == plain_keys("secret")
    assert key_of_environment("API_KEY", "  ") == ()
    with pytest.raises(UsageError, match="API_KEY holds no key"):
        key_of_environment("API_KEY", "two words")
