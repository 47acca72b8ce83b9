"""Names of models and adapters."""

from __future__ import annotations

import pytest

from ovms_lora.core.errors import ConfigError
from ovms_lora.core.names import check_alias, check_model_name, split_model

LONGEST = "x" * 128


@pytest.mark.parametrize("alias", ["sql", "a", "7", "A.b_c-d", "sql.v1", LONGEST, "texts", "Text"])
def test_an_alias_is_accepted(alias: str) -> None:
    assert check_alias(alias) == alias


@pytest.mark.parametrize(
    "alias", ["", "-a", ".a", "_a", "a/b", "a:b", "a b", "a\n", "é", "a@b", LONGEST + "x", "../a", "a\0", "\u0661"]
)
def test_an_alias_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="is not valid") as refused:
        check_alias(alias)
    assert refused.value.hint


@pytest.mark.parametrize("alias", ["text", "image", "audio"])
def test_a_reserved_alias_is_refused(alias: str) -> None:
    with pytest.raises(ConfigError, match="is reserved"):
        check_alias(alias)


@pytest.mark.parametrize("name", ["base_model", "org/model", "a/b/c", "Llama-3.2-1B", "text", LONGEST, "a.b/..c"])
def test_a_model_name_is_accepted(name: str) -> None:
    assert check_model_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "a/../b", "a/.", "..", "../a", "a:b", "a b", "a\n", "-a", LONGEST + "x", "a\\b"]
)
def test_a_model_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not valid"):
        check_model_name(name)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("base", ("base", None)),
        ("base:sql", ("base", "sql")),
        ("org/base:sql", ("org/base", "sql")),
        ("base:a:b", ("base", "a:b")),
        ("base:", ("base", "")),
        (":sql", ("", "sql")),
        ("", ("", None)),
    ],
)
def test_a_model_field_splits_at_its_first_colon(model: str, parts: tuple[str, str | None]) -> None:
    assert split_model(model) == parts
