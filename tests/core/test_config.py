"""config.json: what is read, and what is refused with the cause named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ovms_lora.core.config import EngineOptions, ModelEntry, parse_server_config, read_server_config
from ovms_lora.core.errors import ConfigError

ADAPTER = {"alias": "sql", "path": "loras/sql"}


def entry(name: str = "base", **keys: Any) -> dict[str, Any]:
    return {"config": {"name": name, "base_path": name, **keys}}


def text(*entries: dict[str, Any], **keys: Any) -> str:
    return json.dumps({"model_config_list": list(entries), **keys})


def test_a_plain_entry_is_what_ovms_reads() -> None:
    (model,) = parse_server_config(text(entry("merged"))).models
    assert (model.name, model.base_path, model.takes_adapters) == ("merged", "merged", False)


def test_the_example_of_the_contract_is_read() -> None:
    document = """
    {"model_config_list": [
      {"config": {"name": "merged_model", "base_path": "merged_model"}},
      {"config": {"name": "base_model", "base_path": "base_model",
        "lora_adapters": [{"alias": "sql", "path": "loras/sql", "alpha": 1.0},
                          {"alias": "tools", "path": "loras/tools"}],
        "composite_lora_adapters": [{"alias": "mix", "components": [
            {"adapter_alias": "sql", "alpha": 0.7}, {"adapter_alias": "tools", "alpha": 0.5}]}],
        "lora_options": {"max_loras": 8, "max_lora_rank": 64, "max_cpu_loras": 64, "total_rank": "auto",
            "lora_dtype": "auto", "dynamic_lora_loading_path": "loras", "pinned": ["sql"]}}}
    ]}"""
    _, base = parse_server_config(document).models
    assert base.takes_adapters
    assert [(a.alias, a.path, a.alpha) for a in base.lora_adapters] == [
        ("sql", "loras/sql", 1.0),
        ("tools", "loras/tools", 1.0),
    ]
    assert [(c.adapter_alias, c.alpha) for c in base.composite_lora_adapters[0].components] == [
        ("sql", 0.7),
        ("tools", 0.5),
    ]
    assert base.lora_options is not None
    assert (base.lora_options.total_rank, base.lora_options.pinned) == ("auto", ["sql"])


@pytest.mark.parametrize("document", ["{}", '{"model_config_list": []}', '{"mediapipe_config_list": []}'])
def test_no_models_are_allowed(document: str) -> None:
    assert parse_server_config(document).models == ()


def test_the_older_list_of_ovms_is_read_too() -> None:
    document = text(entry("one"), mediapipe_config_list=[{"name": "two", "base_path": "folder"}])
    assert [model.name for model in parse_server_config(document).models] == ["one", "two"]


def test_names_of_both_lists_must_differ() -> None:
    document = text(entry("one"), mediapipe_config_list=[{"name": "one", "base_path": "folder"}])
    with pytest.raises(ConfigError, match="the name 'one' is used twice"):
        parse_server_config(document)


@pytest.mark.parametrize("options", [{}, {"max_loras": 1}, {"total_rank": 64}, {"lora_dtype": "bf16"}])
def test_lora_options_alone_make_a_model_take_adapters(options: dict[str, Any]) -> None:
    (model,) = parse_server_config(text(entry(lora_options=options))).models
    assert model.takes_adapters


def component(alias: str = "sql", **keys: Any) -> dict[str, Any]:
    return {"adapter_alias": alias, **keys}


def composite(alias: str = "mix", *components: dict[str, Any]) -> dict[str, Any]:
    return {"alias": alias, "components": list(components)}


BAD_TEXTS = [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ('{"model_config_list": []} x', "not valid JSON"),
    ("\ufeff{}", "not valid JSON"),
    ("{'model_config_list': []}", "not valid JSON"),
    ('{"x": ' + "1" * 5000 + "}", "not valid JSON"),
    ("[]", "must hold a JSON object"),
    ("null", "must hold a JSON object"),
    ('"text"', "must hold a JSON object"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": ' * 100_000, "nested too deeply"),
    ('{"model_config_list": [], "model_config_list": []}', "'model_config_list' stands twice"),
    ('{"model_config_list": [{"config": {"name": "a", "base_path": "a", "name": "b"}}]}', "'name' stands twice"),
    (text(unknown=1), "unknown"),
    (text({"config": entry()["config"], "extra": 1}), "model_config_list.0.extra"),
    (text({}), "model_config_list.0.config"),
    (text(entry(nirek=2)), "model_config_list.0.config.nirek: unknown key"),
    (json.dumps({"model_config_list": {}}), "model_config_list"),
    (json.dumps({"model_config_list": [1]}), "model_config_list.0"),
    (json.dumps({"model_config_list": [{"config": {"name": "a"}}]}), "base_path"),
    (json.dumps({"model_config_list": [{"config": {"base_path": "a"}}]}), "name"),
    (json.dumps({"model_config_list": [{"config": {"name": 5, "base_path": "a"}}]}), "model_config_list.0.config.name"),
]
BAD_MODELS: list[tuple[list[dict[str, Any]], str]] = [
    ([entry(""), entry("b")], "model name '' is not valid"),
    ([entry("a b")], "model name 'a b' is not valid"),
    ([entry("../up")], "model name '../up' is not valid"),
    ([entry("a"), entry("a")], "the name 'a' is used twice"),
    ([entry(lora_adapters=[ADAPTER, ADAPTER])], "the name 'sql' is used twice"),
    ([entry("one", lora_adapters=[ADAPTER]), entry("two", lora_adapters=[ADAPTER])], "the name 'sql' is used twice"),
    ([entry("sql", lora_adapters=[ADAPTER])], "the name 'sql' is used twice"),
    ([entry("one", lora_adapters=[ADAPTER]), entry("sql")], "the name 'sql' is used twice"),
    ([entry(lora_adapters=[{**ADAPTER, "alias": "text"}])], "adapter alias 'text' is reserved"),
    ([entry(lora_adapters=[{**ADAPTER, "alias": "a/b"}])], "adapter alias 'a/b' is not valid"),
    ([entry(lora_adapters=[{"alias": "sql"}])], "lora_adapters.0.path"),
    ([entry(lora_adapters=[{**ADAPTER, "beta": 1}])], "lora_adapters.0.beta"),
    ([entry(lora_adapters=[{**ADAPTER, "alpha": "strong"}])], "lora_adapters.0.alpha"),
    ([entry(lora_adapters=[{**ADAPTER, "alpha": float("nan")}])], "lora_adapters.0.alpha"),
    ([entry(lora_adapters=[{**ADAPTER, "alpha": float("-inf")}])], "lora_adapters.0.alpha"),
    ([entry(lora_adapters=[{**ADAPTER, "alpha": 1e300}])], "lora_adapters.0.alpha"),
    ([entry(lora_adapters=[{**ADAPTER, "alpha": -1001}])], "lora_adapters.0.alpha"),
    ([entry(lora_adapters=ADAPTER)], "lora_adapters"),
    (
        [entry(lora_adapters=[ADAPTER], composite_lora_adapters=[composite("mix", component("other"))])],
        "composite 'mix' names unknown adapter 'other'",
    ),
    (
        [entry(lora_adapters=[ADAPTER], composite_lora_adapters=[composite("sql", component())])],
        "the name 'sql' is used twice",
    ),
    ([entry(lora_adapters=[ADAPTER], composite_lora_adapters=[composite("mix")])], "components"),
    (
        [entry(lora_adapters=[ADAPTER], composite_lora_adapters=[composite("mix", component(alpha=float("nan")))])],
        "components.0.alpha",
    ),
    ([entry(lora_options={"max_loras": 0})], "lora_options.max_loras"),
    ([entry(lora_options={"max_lora_rank": 257})], "lora_options.max_lora_rank"),
    ([entry(lora_options={"total_rank": "all"})], "lora_options.total_rank"),
    ([entry(lora_options={"lora_dtype": "f16"})], "lora_options.lora_dtype"),
    ([entry(lora_options={"max_lora": 1})], "lora_options.max_lora"),
    ([entry(lora_options={"pinned": ["sql"]})], "pinned names unknown adapter 'sql'"),
]


@pytest.mark.parametrize(("document", "cause"), [*BAD_TEXTS, *((text(*models), cause) for models, cause in BAD_MODELS)])
def test_a_bad_config_is_refused_with_its_cause(document: str, cause: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_server_config(document)
    assert cause in refused.value.message
    assert refused.value.message.startswith("config.json")
    assert refused.value.hint
    assert "\n" not in refused.value.message + refused.value.hint


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (text(entry("a b")), "model_config_list.0.config.name"),
        (text(entry("a"), entry("a")), "model_config_list.1.config.name"),
        (text(entry("a"), mediapipe_config_list=[{"name": "a"}]), "mediapipe_config_list.0.name"),
        (
            text(entry("a"), entry("b", lora_adapters=[ADAPTER, {**ADAPTER, "alias": "a/b"}])),
            "model_config_list.1.config.lora_adapters.1.alias",
        ),
        (text(entry(lora_adapters=[ADAPTER, ADAPTER])), "model_config_list.0.config.lora_adapters.1.alias"),
        (
            text(
                entry(lora_adapters=[ADAPTER], composite_lora_adapters=[composite("mix", component(), component("x"))])
            ),
            "model_config_list.0.config.composite_lora_adapters.0.components.1.adapter_alias",
        ),
        (text(entry(lora_options={"pinned": ["sql"]})), "model_config_list.0.config.lora_options.pinned.0"),
        (text(**{"a\nb\x1b": 1}), "a\\nb\\x1b"),
    ],
)
def test_the_place_of_a_fault_is_named(document: str, place: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_server_config(document)
    assert refused.value.message.startswith(f"config.json: {place}: ")


def test_a_model_by_itself_refuses_a_name_used_twice() -> None:
    with pytest.raises(ValidationError, match="the name 'sql' is used twice"):
        ModelEntry.model_validate(entry(lora_adapters=[ADAPTER, ADAPTER])["config"])


def test_a_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text(entry("e")), encoding="utf-8")
    assert [model.name for model in read_server_config(path).models] == ["e"]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=str(path)):
        read_server_config(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}", "folder", "pipe", "endless", b" " * ((16 << 20) + 1)])
def test_a_file_that_cannot_be_read_is_named_with_a_hint(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content == "endless":
        path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot read") as refused:
        read_server_config(path)
    assert str(path) in refused.value.message
    assert refused.value.hint


def test_engine_options_have_the_defaults_of_ovms() -> None:
    options = EngineOptions()
    assert (options.max_num_seqs, options.max_num_batched_tokens, options.best_of_limit) == (256, 256, 20)
    assert options.dynamic_split_fuse
    assert options.enable_prefix_caching
    assert EngineOptions().plugin_config is not options.plugin_config
