"""Unpacked weights are the packed ones: what a graph computes stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovms_lora.core.config import EngineOptions
from ovms_lora.engine import graph_source
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.unpacked_weights import multiplies_bytes, unpack_weights
from tests.engine.lora_models import Bases

OUT, GROUPS, SIZE = 6, 2, 16
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def packed_linear(kind: str, *, zero_points: bool) -> ov.Model:
    """A linear as nncf compresses it: integers, zero points, scales in f16; of 4 bits, per group of inputs."""
    rng = np.random.default_rng(0)
    small = kind.endswith("4")
    low, high = (-8, 8) if kind == "i4" else (0, 16) if kind == "u4" else (-128, 128) if kind == "i8" else (0, 256)
    shape = [OUT, GROUPS, SIZE] if small else [OUT, GROUPS * SIZE]
    type_ = getattr(ov.Type, kind)

    def integers(dims: list[int]) -> Any:
        values = rng.integers(low, high, dims)
        return ops.convert(ops.constant(values.astype(np.int8 if kind[0] == "i" else np.uint8), dtype=type_), "f16")

    weight = integers(shape)
    if zero_points:
        weight = ops.subtract(weight, integers([*shape[:-1], 1]))
    weight = ops.multiply(weight, ops.constant(rng.normal(size=[*shape[:-1], 1]).astype(np.float16)))
    if small:
        weight = ops.reshape(weight, ops.constant(np.array([OUT, GROUPS * SIZE], np.int64)), False)
    x = ops.parameter([-1, GROUPS * SIZE], np.float32)
    return ov.Model([ops.result(ops.matmul(x, ops.convert(weight, "f32"), False, True))], [x])


def outputs(model: ov.Model) -> npt.NDArray[np.float32]:
    x = np.random.default_rng(1).normal(size=(3, GROUPS * SIZE)).astype(np.float32)
    result: npt.NDArray[np.float32] = openvino_core().compile_model(model, "CPU", EXACT)([x])[0]
    return result.copy()


def weight_kind(model: ov.Model) -> str:
    matmul = next(node for node in model.get_ops() if node.get_type_name() == "MatMul")
    kind: str = matmul.input_value(1).get_node().get_type_name()
    return kind


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("kind", ["u8", "i8", "u4", "i4"])
def test_the_graph_computes_what_it_did(kind: str, zero_points: bool) -> None:
    model = packed_linear(kind, zero_points=zero_points)
    before = outputs(model)
    unpack_weights(model)
    assert weight_kind(model) == "Constant"
    np.testing.assert_allclose(outputs(model), before, rtol=1e-5, atol=1e-4)


def test_weights_that_are_not_understood_or_no_integers_stay() -> None:
    x = ops.parameter([-1, 4], np.float32)
    odd = ops.convert(ops.negative(ops.convert(ops.constant(np.ones((2, 4), np.int8)), "f16")), "f32")
    half = ops.convert(ops.constant(np.ones((2, 4), np.float16)), "f32")
    for weight in (odd, half):
        model = ov.Model([ops.result(ops.matmul(x, weight, False, True))], [x])
        unpack_weights(model)
        assert weight_kind(model) == "Convert"


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("flags\t\t: fpu sse2 avx2 f16c", False),
        ("flags\t\t: avx2 avx512f avx512_vnni", True),
        ("flags\t\t: avx2 avx_vnni", True),
        ("Features\t: asimd", True),
    ],
)
def test_a_processor_says_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, answer: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    assert multiplies_bytes(cpuinfo)  # nothing is known
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: some\n{flags}\n")
    assert multiplies_bytes(cpuinfo) is answer


@pytest.mark.parametrize(
    ("can", "memory", "options", "unpacked"),
    [
        (False, 1 << 36, {}, True),
        (True, 1 << 36, {}, False),
        (False, 1 << 10, {}, False),
        (False, 1 << 36, {"INFERENCE_PRECISION_HINT": "bf16"}, False),
    ],
)
def test_weights_are_unpacked_where_it_helps_and_there_is_room(
    bases: Bases, monkeypatch: pytest.MonkeyPatch, can: bool, memory: int, options: dict[str, str], unpacked: bool
) -> None:
    monkeypatch.setattr(graph_source, "multiplies_bytes", lambda: can)
    monkeypatch.setattr(graph_source, "total_memory", lambda: memory)
    seen: list[ov.Model] = []
    monkeypatch.setattr(graph_source, "unpack_weights", seen.append)
    plugin_config = {"INFERENCE_PRECISION_HINT": "f32", **options}
    GraphSource(bases.get("llama").folder, EngineOptions(plugin_config=plugin_config)).compile()
    assert bool(seen) is unpacked
