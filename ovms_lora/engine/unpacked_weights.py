"""Weights of linears unpacked to float32 ahead of time, for processors that cannot multiply bytes.

With instructions for it (VNNI, AMX) integer weights are multiplied as they are. Without them the CPU device turns them
into float32 again in every step, which takes longer than reading four times the bytes: at batch 16 a step with unpacked
weights takes two thirds of the time, alone about the same. The numbers are the same but for the order of sums.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

_MULTIPLIES_BYTES = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
_INTEGERS = frozenset({"u8", "i8", "u4", "i4"})

Array = npt.NDArray[Any]

_STEPS: dict[str, Callable[..., Array]] = {
    "Convert": lambda _, values: values,
    "Subtract": lambda _, values, zero_points: np.subtract(values, zero_points, out=values),
    "Multiply": lambda _, values, scales: np.multiply(values, scales, out=values),
    "Reshape": lambda output, values, _: values.reshape(tuple(output.get_shape())),
}


def multiplies_bytes(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products of integers; where nothing is known, it is taken to."""
    if platform.machine() not in {"x86_64", "AMD64"} or not cpuinfo.is_file():
        return True
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    return flags is None or not _MULTIPLIES_BYTES.isdisjoint(flags)


def unpack_weights(model: ov.Model) -> None:
    """Give every MatMul with an integer weight that weight in float32. What is not understood stays as it is."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _holds_integers(node.input_value(1)):
            values = _values(node.input_value(1))
            if values is not None:
                node.input(1).replace_source_output(ops.constant(values, shared_memory=True).output(0))


def _holds_integers(weight: ov.Output) -> bool:
    """Whether integers stand at the end of the chain of first inputs, which decompresses a weight."""
    node = weight.get_node()
    while node.get_type_name() in _STEPS:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in _INTEGERS


def _values(output: ov.Output) -> Array | None:
    """Return what a chain of decompression gives, in a new float32 array; None for an operation not known here."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return _constant(node)
    inputs = [_values(value) for value in node.input_values()] if kind in _STEPS else [None]
    if any(values is None for values in inputs):
        return None
    return _STEPS[kind](output, *inputs)


def _constant(node: ov.Node) -> Array:
    kind = node.get_element_type().get_type_name()
    data: Array = node.data
    if kind not in {"u4", "i4"}:
        return data.astype(np.float32)
    # Two to a byte, the first one in the lower half.
    packed = np.frombuffer(data.tobytes(), np.uint8)
    pairs = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1)[: int(np.prod(node.get_output_shape(0)))]
    values = pairs.astype(np.float32)
    if kind == "i4":
        values[values > 7] -= 16
    return values.reshape(tuple(node.get_output_shape(0)))
