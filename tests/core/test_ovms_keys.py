"""The keys that OVMS's config.json may hold: honoured, accepted without effect, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ovms_lora.core.config import ModelEntry, parse_server_config
from ovms_lora.core.errors import ConfigError


def read(**keys: Any) -> ModelEntry:
    entry = {"name": "m", "base_path": "m", **keys}
    (model,) = parse_server_config(json.dumps({"model_config_list": [{"config": entry}]})).models
    return model


def test_device_properties_and_graph_are_honoured() -> None:
    model = read(target_device="CPU", plugin_config={"NUM_STREAMS": "1"}, graph_path="graphs/llm.pbtxt")
    assert (model.target_device, model.plugin_config) == ("CPU", {"NUM_STREAMS": "1"})
    assert model.graph_path == "graphs/llm.pbtxt"
    assert model.without_effect == ()


def test_objects_may_be_written_as_strings_of_json() -> None:
    model = read(plugin_config='{"CACHE_DIR": "/c"}', model_version_policy='{"specific": {"versions": [2]}}')
    assert model.plugin_config == {"CACHE_DIR": "/c"}
    assert model.model_version_policy is not None
    assert model.model_version_policy.versions == (2,)


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ({"latest": {}}, None),
        ({"latest": {"num_versions": 2}}, None),
        ({"all": {}}, None),
        ({"specific": {"versions": [1, 3]}}, (1, 3)),
    ],
)
def test_a_version_policy_says_which_versions_may_be_served(policy: Any, versions: tuple[int, ...] | None) -> None:
    model = read(model_version_policy=policy)
    assert model.model_version_policy is not None
    assert model.model_version_policy.versions == versions


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nireq", 8),
        ("batch_size", 0),
        ("batch_size", "auto"),
        ("batch_size", "1:8"),
        ("max_sequence_number", 500),
        ("idle_sequence_cleanup", True),
        ("graph_queue_max_size", -1),
        ("graph_queue_max_size", "AUTO"),
        ("allow_cache", True),
        ("subconfig", "subconfig.json"),
        ("shape", "auto"),
        ("stateful", False),
        ("low_latency_transformation", False),
    ],
)
def test_keys_that_change_no_answer_are_accepted(key: str, value: Any) -> None:
    assert read(**{key: value}).without_effect == (key,)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", "(1,128)", "a fixed shape"),
        ("shape", {"input_ids": "(1,128)"}, "a fixed shape"),
        ("stateful", True, "would transform the model"),
        ("low_latency_transformation", True, "would transform the model"),
        ("layout", "NC:CN", "no meaning for a language model"),
        ("custom_loader_options", {"loader_name": "l"}, "no meaning for a language model"),
        ("nireq", -1, "greater than or equal to 0"),
        ("nireq", "many", "valid integer"),
        ("plugin_config", "{", "the string is not JSON"),
        ("plugin_config", "[]", "valid dictionary"),
        ("target_device", 5, "valid string"),
        ("model_version_policy", {"newest": {}}, "unknown key"),
        ("model_version_policy", {"specific": {"versions": []}}, "at least 1 item"),
        ("graph_path", "", "is not a path"),
        ("base_path", "a\0b", "is not a path"),
        ("base_path", "\ud800", "is not a path"),
        ("base_path", "s3://bucket/models", "s3:// is not read from here"),
    ],
)
def test_what_would_change_the_model_is_refused_with_its_place(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(**{key: value})
    assert refused.value.message.startswith(f"config.json: model_config_list.0.config.{key}")
    assert message in refused.value.message
    assert refused.value.hint
    assert "\n" not in refused.value.message + refused.value.hint


def test_a_graph_lies_by_default_in_the_folder_of_its_name() -> None:
    document = {
        "model_config_list": [],
        "mediapipe_config_list": [
            {"name": "org/one"},
            {"name": "two", "base_path": "elsewhere", "graph_path": "g.pbtxt", "subconfig": "s.json"},
        ],
    }
    one, two = parse_server_config(json.dumps(document)).models
    assert (one.name, one.base_path) == ("org/one", "org/one")
    assert (two.base_path, two.graph_path) == ("elsewhere", "g.pbtxt")


@pytest.mark.parametrize(
    ("monitoring", "enabled"),
    [
        ({}, None),
        ({"metrics": {"enable": True, "metrics_list": ["ovms_streams"]}}, True),
        ({"metrics": {"enable": False}}, False),
    ],
)
def test_monitoring_may_turn_metrics_off(monitoring: Any, enabled: bool | None) -> None:
    config = parse_server_config(json.dumps({"model_config_list": [], "monitoring": monitoring}))
    assert config.monitoring.metrics.enable is enabled


@pytest.mark.parametrize(
    "key", ["custom_loader_config_list", "pipeline_config_list", "custom_node_library_config_list"]
)
def test_lists_of_other_kinds_of_models_may_only_be_empty(key: str) -> None:
    assert parse_server_config(json.dumps({key: []})).models == ()
    with pytest.raises(ConfigError, match=f"^config.json: {key}: ") as refused:
        parse_server_config(json.dumps({key: [{"name": "p"}]}))
    assert refused.value.hint == "remove its items: only language models are served"
