"""An adapter is loaded as it is, or refused with a code and the tensor or field that is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ovms_lora.adapters.adapter import Adapter, BaseLinears, inspect_adapter, load_adapter
from ovms_lora.core.errors import AdapterError
from tests.adapters.adapter_files import PREFIX, Array, good_config, good_tensors, tiny_base, write_adapter
from tests.processor_time import at_most

Tensors = dict[str, Array]
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
V1 = f"{PREFIX}model.layers.1.self_attn.v_proj"
A, B = ".lora_A.weight", ".lora_B.weight"
ONES = np.ones((2, 8), np.float32)


def load(folder: Path, base: BaseLinears | None = None, *, max_lora_rank: int = 64, dtype: Any = np.float32) -> Adapter:
    return load_adapter(folder, base or tiny_base(), max_lora_rank=max_lora_rank, lora_dtype=dtype)


def refusal(folder: Path, **how: Any) -> AdapterError:
    with at_most(0.1), pytest.raises(AdapterError) as caught:
        load(folder, **how)
    assert caught.value.message.isprintable()
    return caught.value


def _poke(value: float) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        tensors[V1 + B][1, 1] = value

    return change


def _put(name: str, array: Array) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: array})


def _drop(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def _rename(before: str, after: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({after: tensors.pop(before)})


# name: (change to the tensors, changes to the configuration, code, text in the message)
TENSOR_ROWS: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str, str]] = {
    "NaN": (_poke(np.nan), {}, "adapter_nonfinite", V1 + B),
    "infinity": (_poke(np.inf), {}, "adapter_nonfinite", V1 + B),
    "minus infinity": (_poke(-np.inf), {}, "adapter_nonfinite", V1 + B),
    "A without B": (_drop(Q0 + B), {}, "adapter_incomplete", Q0 + A),
    "B without A": (_drop(V1 + A), {}, "adapter_incomplete", V1 + B),
    "a target without tensors": (_drop(V1 + A, V1 + B), {}, "adapter_incomplete", "model.layers.1.self_attn.v_proj"),
    "no tensors": (lambda tensors: tensors.clear(), {}, "adapter_incomplete", "no LoRA tensors"),
    "A too wide": (_put(Q0 + A, np.ones((2, 9), np.float32)), {}, "adapter_shape", Q0 + A),
    "A transposed": (_put(Q0 + A, np.ones((8, 2), np.float32)), {}, "adapter_shape", Q0 + A),
    "B too narrow": (_put(Q0 + B, np.ones((7, 2), np.float32)), {}, "adapter_shape", Q0 + B),
    "A of one dimension": (_put(Q0 + A, np.ones(16, np.float32)), {}, "adapter_shape", Q0 + A),
    "A of no dimension": (_put(Q0 + A, np.array(1, np.float32)), {}, "adapter_shape", Q0 + A),
    "B of a convolution": (_put(Q0 + B, np.ones((8, 2, 1), np.float32)), {}, "adapter_shape", Q0 + B),
    "A of rank 0": (_put(Q0 + A, np.ones((0, 8), np.float32)), {}, "adapter_rank", Q0 + A),
    "A of another rank": (_put(Q0 + A, np.ones((3, 8), np.float32)), {}, "adapter_rank", Q0 + A),
    "B of another rank": (_put(Q0 + B, np.ones((8, 3), np.float32)), {}, "adapter_rank", Q0 + B),
    "r of another rank": (lambda tensors: None, {"r": 4}, "adapter_rank", "gives its module 4"),
    "pattern of another rank": (lambda tensors: None, {"rank_pattern": {"v_proj": 3}}, "adapter_rank", "v_proj"),
    "rank too high": (
        lambda tensors: None,
        {"r": 65},
        "adapter_rank",
        "LoRA rank 65 is greater than max_lora_rank 64.",
    ),
    "rank of a pattern too high": (
        lambda tensors: None,
        {"rank_pattern": {"1.self_attn.v_proj": 1 << 40}},
        "adapter_rank",
        "LoRA rank 1099511627776 is greater than max_lora_rank 64.",
    ),
    "a rank bomb": (_put(Q0 + A, np.ones((50_000, 8), np.float32)), {}, "adapter_rank", "50000"),
    "float64": (_put(Q0 + A, ONES.astype(np.float64)), {}, "adapter_dtype", Q0 + A),
    "int8": (_put(Q0 + A, ONES.astype(np.int8)), {}, "adapter_dtype", Q0 + A),
    "int64": (_put(Q0 + A, ONES.astype(np.int64)), {}, "adapter_dtype", Q0 + A),
    "no such layer": (
        _rename(Q0 + A, f"{PREFIX}model.layers.0.self_attn.nothing{A}"),
        {},
        "adapter_module",
        "self_attn.nothing",
    ),
    "a layer too many": (
        _rename(Q0 + A, f"{PREFIX}model.layers.2.self_attn.q_proj{A}"),
        {},
        "adapter_base_mismatch",
        "model.layers.2.self_attn.q_proj",
    ),
    "no layer that is known": (
        lambda tensors: [tensors.update({n.replace("self_attn", "mixer"): tensors.pop(n)}) for n in list(tensors)],
        {},
        "adapter_module",
        "mixer",
    ),
    "not a target": (lambda tensors: None, {"target_modules": ["v_proj"]}, "adapter_module", Q0 + A),
    "excluded": (lambda tensors: None, {"exclude_modules": ["0.self_attn.q_proj"]}, "adapter_module", Q0 + A),
    "not a layer to transform": (lambda tensors: None, {"layers_to_transform": 0}, "adapter_module", "model.layers.1"),
    "more targets": (
        lambda tensors: None,
        {"target_modules": ["q_proj", "v_proj", "lm_head"]},
        "adapter_incomplete",
        "lm_head",
    ),
    "a name twice": (_put(f"model.layers.0.self_attn.q_proj{A}", ONES), {}, "adapter_module", "not the only one"),
    "two adapters": (_rename(Q0 + A, f"{Q0}.lora_A.other.weight"), {}, "adapter_module", "more than one adapter"),
    "no LoRA tensor": (_put("surprise", ONES), {}, "adapter_module", "surprise"),
    "an embedding": (
        _put(f"{PREFIX}model.embed_tokens.lora_embedding_A", ONES),
        {},
        "adapter_unsupported",
        "lora_embedding_A",
    ),
    "a DoRA magnitude": (_put(f"{Q0}.lora_magnitude_vector.weight", ONES[0]), {}, "adapter_unsupported", "magnitude"),
    "a DoRA magnitude, older": (_put(f"{Q0}.lora_magnitude_vector", ONES[0]), {}, "adapter_unsupported", "magnitude"),
    "a bias of B": (_put(f"{Q0}.lora_B.bias", ONES[0]), {}, "adapter_unsupported", "lora_B.bias"),
    "a bias of the base": (_put(f"{Q0}.bias", ONES[0]), {}, "adapter_unsupported", "q_proj.bias"),
    "a saved module": (_put(f"{PREFIX}lm_head.weight", ONES), {}, "adapter_unsupported", "lm_head.weight"),
    "a saved module, older": (
        _put(f"{PREFIX}lm_head.modules_to_save.default.weight", ONES),
        {},
        "adapter_unsupported",
        "modules_to_save",
    ),
    "a copy of a base weight without a LoRA": (
        _put(f"{PREFIX}lm_head.base_layer.weight", ONES),
        {},
        "adapter_unsupported",
        "base_layer",
    ),
    "a copy of another base weight": (
        _put(f"{Q0}.base_layer.weight", ONES),
        {},
        "adapter_base_mismatch",
        "base_layer",
    ),
    "control characters": (_put("\x1b[2J\n" + "x" * 3000, ONES), {}, "adapter_module", r"\x1b[2J\n"),
    "a regex bomb": (lambda tensors: None, {"target_modules": "(.*)*" * 300 + "b"}, "adapter_module", Q0 + A),
}


@pytest.mark.parametrize("row", TENSOR_ROWS)
def test_a_bad_adapter_is_refused(row: str, tmp_path: Path) -> None:
    change, settings, code, text = TENSOR_ROWS[row]
    tensors = good_tensors()
    change(tensors)
    error = refusal(write_adapter(tmp_path, tensors=tensors, config=good_config(**settings)))
    assert error.code == code
    assert text in error.message


def test_widths_that_never_fit_are_those_of_another_base(tmp_path: Path) -> None:
    error = refusal(write_adapter(tmp_path, tensors=good_tensors(tiny_base(width=12))))
    assert error.code == "adapter_base_mismatch"


def test_a_base_with_more_layers_misses_some(tmp_path: Path) -> None:
    error = refusal(write_adapter(tmp_path), base=tiny_base(layers=3))
    assert error.code == "adapter_incomplete"
    assert "model.layers.2.self_attn.q_proj" in error.message


def test_max_lora_rank_itself_is_allowed(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    assert load(tmp_path, max_lora_rank=2).max_rank == 2
    assert refusal(tmp_path, max_lora_rank=1).message == "LoRA rank 2 is greater than max_lora_rank 1."


def test_a_value_too_large_for_lora_dtype_is_refused(tmp_path: Path) -> None:
    tensors = good_tensors()
    tensors[V1 + A][0, 0] = 7e4
    write_adapter(tmp_path, tensors=tensors)
    assert load(tmp_path).max_rank == 2
    error = refusal(tmp_path, dtype=np.float16)
    assert error.code == "adapter_nonfinite"
    assert V1 + A in error.message


@pytest.mark.parametrize("value", [1.01e15, -1e20, 3.4e38])
@pytest.mark.parametrize("side", [A, B])
def test_a_value_that_makes_sums_overflow_is_refused(side: str, value: float, tmp_path: Path) -> None:
    tensors = good_tensors()
    tensors[V1 + side][1, 1] = value
    error = refusal(write_adapter(tmp_path, tensors=tensors))
    assert error.code == "adapter_nonfinite"
    assert V1 + side in error.message and "overflow" in error.message


def test_a_scaling_that_makes_sums_overflow_is_refused(tmp_path: Path) -> None:
    error = refusal(write_adapter(tmp_path, config=good_config(alpha_pattern={"v_proj": -1e30})))
    assert error.code == "adapter_nonfinite"
    assert B in error.message and "scaling" in error.message


def test_values_that_are_only_large_are_taken(tmp_path: Path) -> None:
    tensors = good_tensors()
    tensors[V1 + B][1, 1] = 9e14 / 2  # alpha / r is 2
    assert load(write_adapter(tmp_path, tensors=tensors)).max_rank == 2


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    same, again = write_adapter(tmp_path / "a"), write_adapter(tmp_path / "b")
    tensors = good_tensors()
    tensors[V1 + B][0, 0] += 1
    other_weights = write_adapter(tmp_path / "c", tensors=tensors)
    other_config = write_adapter(tmp_path / "d", config=good_config(lora_alpha=5))
    digests = [load(folder).digest for folder in (same, again, other_weights, other_config)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_what_is_known_of_an_adapter_without_a_base(tmp_path: Path) -> None:
    summary = inspect_adapter(write_adapter(tmp_path, tensors=good_tensors(dtype=ml_dtypes.bfloat16)))
    assert summary.ranks["model.layers.1.self_attn.v_proj"] == summary.max_rank == 2
    assert summary.dtypes == ("bfloat16",)
    assert summary.nbytes == load(tmp_path, dtype=ml_dtypes.bfloat16).nbytes
    assert summary.config.lora_alpha == 4


def test_inspecting_refuses_what_needs_no_base(tmp_path: Path) -> None:
    write_adapter(tmp_path, config=good_config(r=4))
    with pytest.raises(AdapterError) as caught:
        inspect_adapter(tmp_path)
    assert caught.value.code == "adapter_rank"


def seconds_to_refusal(folder: Path, base: BaseLinears) -> float:
    started = time.thread_time()
    with pytest.raises(AdapterError, match="takes too long"):
        load(folder, base)
    return time.thread_time() - started


def test_a_configuration_with_thousands_of_expressions_is_refused_at_once(tmp_path: Path) -> None:
    base = tiny_base(layers=80)
    config = good_config(alpha_pattern={f".*q{n}$": 2 for n in range(2000)})
    write_adapter(tmp_path, config=json.dumps(config).encode(), tensors=good_tensors(base))
    assert min(seconds_to_refusal(tmp_path, base) for _ in range(3)) < 0.1  # the best: others compute, too


def test_a_configuration_with_thousands_of_patterns_is_quick(tmp_path: Path) -> None:
    base = tiny_base(layers=80)
    patterns = {f"model.layers.{n}.self_attn.q_projection": 3 for n in range(2000)}
    config = good_config(rank_pattern=patterns, alpha_pattern=patterns)
    write_adapter(tmp_path, config=json.dumps(config).encode(), tensors=good_tensors(base))
    with at_most(1):
        assert load(tmp_path, base).max_rank == 2
