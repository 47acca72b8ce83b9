"""The linear layers of an IR: found by PyTorch module path, grouped by the input that they share, and made one.

`__module.model.layers.0.self_attn.q_proj/aten::linear/MatMul` is the layer `model.layers.0.self_attn.q_proj`. Layers
that read one input (q, k and v; gate and up) are computed as one wide layer: fewer and larger steps, the same numbers.
Knows no adapters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops

_MODULE_PATH = re.compile(r"__module\.([^/]+)/")
_WIDTH_AXIS = 2  # activations are [tokens, 1, width]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """One linear layer; its weight is [out_features, in_features]."""

    path: str
    node: ov.Node
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, eq=False)
class Carrier:
    """Where the outputs of some linears, side by side, can be intercepted: `output` [tokens, 1, Σ out_features]."""

    linears: tuple[Linear, ...]
    output: ov.Output
    readers: tuple[ov.Input, ...]

    def divert(self, output: ov.Output) -> None:
        """Let all who read the carrier's output read `output` instead."""
        for reader in self.readers:
            reader.replace_source_output(output)


@dataclass(frozen=True, slots=True, eq=False)
class LinearGroup:
    """Linears that read the same input, in the order of the graph, and the carriers of their outputs."""

    linears: tuple[Linear, ...]
    carriers: tuple[Carrier, ...]

    @property
    def input(self) -> ov.Output:
        """What they read: [tokens, 1, in_features]."""
        return self.linears[0].node.input_value(0)


def find_linears(model: ov.Model) -> list[Linear]:
    """Return the MatMuls of the model that keep a module's name and have a constant [out, in] weight."""
    found = []
    for node in model.get_ordered_ops():
        match = _MODULE_PATH.match(node.get_friendly_name())
        if node.get_type_name() != "MatMul" or match is None:
            continue
        weight = node.input_value(1).get_partial_shape()
        if node.get_attributes()["transpose_b"] and weight.is_static and len(weight) == 2:
            rows, columns = (dimension.get_length() for dimension in weight)
            found.append(Linear(match[1], node, rows, columns))
    return found


def group_linears(linears: Sequence[Linear]) -> list[LinearGroup]:
    """Group linears by their input, and make each group one wide linear where its weights can be joined.

    Changes the model; to be called once. A group whose weights cannot be joined keeps its own linears.
    """
    groups: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        source = linear.node.input_value(0)
        groups.setdefault((source.get_node().get_name(), source.get_index()), []).append(linear)
    return [LinearGroup(tuple(group), _carriers(group)) for group in groups.values()]


def split_carrier(carrier: Carrier) -> tuple[Carrier, ...]:
    """Return one carrier for each linear of a carrier, for when they are not all treated alike."""
    if len(carrier.linears) == 1:
        return (carrier,)
    split = carrier.readers[0].get_node()
    return tuple(
        Carrier((linear,), output, tuple(output.get_target_inputs()))
        for linear, output in zip(carrier.linears, split.outputs(), strict=True)
    )


def _carriers(group: Sequence[Linear]) -> tuple[Carrier, ...]:
    weight = _joined([linear.node.input_value(1) for linear in group]) if len(group) > 1 else None
    if weight is None:
        return tuple(Carrier((linear,), linear.node.output(0), _readers(linear)) for linear in group)
    wide = ops.matmul(group[0].node.input_value(0), weight, False, True)
    wide.set_friendly_name(group[0].node.get_friendly_name() + "+" + "+".join(linear.path for linear in group[1:]))
    widths = np.array([linear.out_features for linear in group], np.int64)
    split = ops.variadic_split(wide, ops.constant(np.int64(_WIDTH_AXIS)), ops.constant(widths))
    for linear, output in zip(group, split.outputs(), strict=True):
        for reader in _readers(linear):
            reader.replace_source_output(output)
    return (Carrier(tuple(group), wide.output(0), (split.input(0),)),)


def _readers(linear: Linear) -> tuple[ov.Input, ...]:
    return tuple(linear.node.output(0).get_target_inputs())


# Below the weight of a linear stands a constant, or one with what decompresses it: u8 → f16 - zero point · scale → f32.
_JOINABLE = frozenset({"Convert", "Subtract", "Multiply"})


def _joined(weights: Sequence[ov.Output]) -> ov.Output | None:
    """Return weights [oᵢ, in] stacked to one [Σ oᵢ, in], decompression included; None when they differ in kind."""
    nodes = [weight.get_node() for weight in weights]
    kinds = {(node.get_type_name(), str(node.get_output_element_type(0))) for node in nodes}
    if len(kinds) > 1:
        return None
    if nodes[0].get_type_name() == "Constant":
        return _joined_constants(nodes)
    if nodes[0].get_type_name() not in _JOINABLE:
        return None
    inputs = [_joined([node.input_value(i) for node in nodes]) for i in range(nodes[0].get_input_size())]
    if any(joined is None for joined in inputs):
        return None
    if nodes[0].get_type_name() == "Convert":
        clone = ops.convert(inputs[0], nodes[0].get_output_element_type(0).to_string())
    else:
        operation = ops.subtract if nodes[0].get_type_name() == "Subtract" else ops.multiply
        clone = operation(*inputs)
    for key, value in nodes[0].get_rt_info().items():  # among it: keep this Convert, it decompresses a weight
        clone.set_rt_info(value, key)
    output: ov.Output = clone.output(0)
    return output


def _joined_constants(nodes: Sequence[ov.Node]) -> ov.Output | None:
    if nodes[0].get_output_element_type(0).bitwidth < 8 or "bf" in str(nodes[0].get_output_element_type(0)):
        return None  # numpy has no arrays of these
    shapes = {tuple(node.get_output_shape(0))[1:] for node in nodes}
    if len(shapes) > 1 or any(len(node.get_output_shape(0)) != 2 for node in nodes):
        return None
    joined = np.concatenate([node.data for node in nodes])
    output: ov.Output = ops.constant(joined, shared_memory=True).output(0)
    return output
