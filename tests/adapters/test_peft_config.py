"""adapter_config.json: every field of PEFT has a place, and what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.adapters import peft_config
from ovms_lora.adapters.adapter import inspect_adapter
from ovms_lora.adapters.peft_config import PeftConfig, parse_peft_config
from ovms_lora.core.errors import AdapterError
from tests.adapters.adapter_files import good_config, write_adapter
from tests.processor_time import at_most

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig


def parse(**changes: Any) -> PeftConfig:
    return parse_peft_config(json.dumps(good_config(**changes)).encode())


def refusal(data: bytes) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        parse_peft_config(data)
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400
    return caught.value


def test_every_field_of_peft_has_a_place() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = set(peft_config._Document.model_fields) | peft_config._TRAINING_ONLY | peft_config._AT_REST
    assert fields - known == set()


def test_defaults_are_those_of_peft() -> None:
    config = parse_peft_config(b'{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    theirs = LoraConfig()
    assert (config.r, config.lora_alpha, config.use_rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)


def test_a_null_is_the_default() -> None:
    names = ["rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "bias"]
    assert parse(**dict.fromkeys(names)) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", False),
        ("modules_to_save", None),
        ("modules_to_save", []),
        ("loftq_config", {}),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("init_lora_weights", True),
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("lora_dropout", 0.1),
        ("megatron_core", "megatron.core"),
        ("task_type", "CAUSAL_LM"),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
        ("base_model_name_or_path", "some/model"),
        ("qalora_group_size", 16),
        ("a_field_of_tomorrow", None),
        ("a_field_of_tomorrow", False),
        ("a_field_of_tomorrow", {}),
        ("a_field_of_tomorrow", ""),
    ],
)
def test_what_changes_no_answer_is_taken(field: str, value: Any) -> None:
    assert parse(**{field: value}).r == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"num_groups": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {"tp": 2}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of tomorrow"),
        ("peft_type", "ADALORA"),
        ("peft_type", "PROMPT_TUNING"),
        ("a_field_of_tomorrow", True),
        ("a_field_of_tomorrow", 0),
        ("a_field_of_tomorrow", [1]),
        ("a_field_of_tomorrow", "x"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(json.dumps(good_config(**{field: value})).encode())
    assert error.code == "adapter_unsupported"
    assert field in error.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", 8.0),
        ("r", True),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", 1e39),
        ("lora_alpha", [1]),
        ("use_rslora", 1),
        ("use_rslora", "true"),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["x"] * 3000),
        ("exclude_modules", 5),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"q_proj": 8.5}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {str(number): 1 for number in range(3000)}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": 1e300}),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1, "2"]),
        ("layers_to_transform", True),
        ("layers_pattern", "layers"),
        ("layers_pattern", [1]),
        ("fan_in_fan_out", "no"),
        ("bias", 0),
        ("peft_type", None),
        ("peft_type", 5),
        ("init_lora_weights", 3),
        ("base_model_name_or_path", 3),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(json.dumps(good_config(**{field: value})).encode())
    assert error.code == "adapter_config_invalid"
    assert field in error.message


@pytest.mark.parametrize("target", ["all-linear", "ALL-linear", ".*q_proj"])
@pytest.mark.parametrize(("field", "value"), [("layers_to_transform", [1]), ("layers_pattern", "layers")])
def test_layers_cannot_go_with_a_string_of_targets(target: str, field: str, value: Any) -> None:
    changes = {"target_modules": target, "layers_to_transform": None, "layers_pattern": None, field: value}
    assert refusal(json.dumps(good_config(**changes)).encode()).code == "adapter_config_invalid"


@pytest.mark.parametrize("changes", [{"r": 0}, {"r": -1}, {"rank_pattern": {"q_proj": 0}}])
def test_a_rank_below_one_is_refused(changes: dict[str, Any]) -> None:
    error = refusal(json.dumps(good_config(**changes)).encode())
    assert error.code == "adapter_rank"
    assert next(iter(changes)) in error.message


GOOD = json.dumps(good_config())
MALFORMED = {
    "empty": b"",
    "blank": b"   ",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "cut": GOOD[:-5].encode(),
    "more behind": GOOD.encode() + b"{}",
    "no UTF-8": b'{"peft_type": "\xff\xfe"}',
    "UTF-16": GOOD.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "key twice": GOOD.replace('"r"', '"lora_alpha": 1, "r"').encode(),
    "key twice below": b'{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}',
    "NaN": GOOD.replace("4", "NaN").encode(),
    "Infinity": GOOD.replace("4", "Infinity").encode(),
    "-Infinity": GOOD.replace("4", "-Infinity").encode(),
    "infinite by exponent": GOOD.replace("4", "1e999").encode(),
    "digits without end": GOOD.replace("4", "4" * 100_000).encode(),
    "rank of many digits": GOOD.replace('"r": 2', '"r": ' + "2" * 5000).encode(),
    "deep": b'{"auto_mapping": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deep enough": b'{"auto_mapping": ' + b"[" * 20 + b"]" * 20 + b"}",
    "deep and open": b"[" * 900_000,
    "deep objects": b'{"a":' * 5000,
    "a million objects": b'{"auto_mapping": [' + b"{}," * 300_000 + b"{}]}",
    "a million numbers": b'{"auto_mapping": [' + b"1," * 500_000 + b"1]}",
    "too large": b'{"peft_version": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_plain_json_object_is_refused_at_once(case: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, config=MALFORMED[case])
    with at_most(0.1), pytest.raises(AdapterError) as caught:
        inspect_adapter(folder)
    assert caught.value.code == "adapter_config_invalid"
    assert caught.value.message.isprintable()


def test_names_from_the_file_are_shown_escaped_and_cut() -> None:
    error = refusal(json.dumps(good_config(**{"\x1b[31m\nx" + "y" * 5000: 1})).encode())
    assert r"\x1b[31m\nx" in error.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["LORA", "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*sorted(peft_config._Document.model_fields), "use_dora", "lora_dropout", "new"])


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_any_values_give_a_configuration_or_a_typed_error(changes: dict[str, Any]) -> None:
    try:
        config = parse(**changes)
    except AdapterError as error:
        assert error.message.isprintable()
    else:
        assert config.r >= 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_configuration_or_a_typed_error(data: st.DataObject) -> None:
    mutated = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not mutated:
            break
    try:
        parse_peft_config(bytes(mutated))
    except AdapterError as error:
        assert error.message.isprintable()
