"""The LoRA part of the graph: any mix of adapters, blends and plain base rows as one dense computation.

For each group of linears that read one input x [T, 1, in], with the total rank R of all resident adapters together:

    xs = x[rows]                                   rows  int32 [L]: the rows of T that use an adapter, perhaps none
    h  = (xs · A) ⊙ [alpha | alpha | …]            A     [in, n·R], one block of R columns for each of n linears
    y[rows] += [h₁ · B₁ | h₂ · B₂ | …]             Bⱼ    [R, outⱼ]

`alpha` f32 [L, R] holds a row's strengths: zero outside the rank rows of its own adapters, so adapters do not mix. The
adapters' own scaling is part of B. A and B are state variables that `lora_states` fills.

Two things about the CPU device decide the form. A MatMul whose weight is a state with a *constant* initial value
becomes a fully connected layer, which packs that weight once and never looks at the state again; so the initial value
comes from a parameter. And with L = 0 the nodes of this part have nothing to do, so base rows only pay for walking past
them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import util as op_util

from ovms_lora.engine.linears import Carrier, LinearGroup, split_carrier

ROWS, ALPHA = "lora_rows", "lora_alpha"
HEAD_ROWS, HEAD_ALPHA = "lora_head_rows", "lora_head_alpha"
INITIAL = "lora_initial"


@dataclass(frozen=True, slots=True)
class LoraSlotGroup:
    """The state names of one group: A of all its linears together, and B of each, in the order of A's blocks."""

    a: str
    b: tuple[str, ...]
    paths: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """What was inserted: `total_rank` rank rows, states of `dtype` ("f32" or "bf16"), and the groups.

    `head` says whether the layer that makes logits is among them: its rows are those of the sampled tokens.
    """

    total_rank: int
    dtype: str
    groups: tuple[LoraSlotGroup, ...]
    head: bool

    @property
    def paths(self) -> frozenset[str]:
        """The linears that can take a LoRA."""
        return frozenset(path for group in self.groups for path in group.paths)


class _Insertion:
    """Adds the nodes to one model."""

    def __init__(self, model: ov.Model, total_rank: int, dtype: str) -> None:
        self._model, self._rank, self._dtype = model, total_rank, dtype
        self._initial = ops.parameter([], np.float32)
        self._initial.output(0).set_names({INITIAL})
        self._parameters = [self._initial]
        self._typed_initial = self._typed(self._initial)
        self._variables: list[op_util.Variable] = []
        self._sinks: list[ov.Node] = []
        self._strengths: dict[tuple[str, int], ov.Node] = {}

    def rows(self, rows_name: str, alpha_name: str) -> tuple[ov.Node, ov.Node]:
        """Add the inputs that say which rows use adapters, and how strongly."""
        rows = ops.parameter([-1], np.int32)
        rows.output(0).set_names({rows_name})
        alpha = ops.parameter([-1, self._rank], np.float32, name=alpha_name)
        alpha.output(0).set_names({alpha_name})
        self._parameters += [rows, alpha]
        return rows, self._typed(alpha)

    def add(self, group: LinearGroup, targets: Collection[str], rows: ov.Node, alpha: ov.Node) -> LoraSlotGroup:
        """Add the LoRA of a group's targeted linears."""
        linears = [linear for linear in group.linears if linear.path in targets]
        name = "+".join(linear.path for linear in linears)
        slots = LoraSlotGroup(
            f"lora_A.{name}",
            tuple(f"lora_B.{linear.path}" for linear in linears),
            tuple(linear.path for linear in linears),
            linears[0].in_features,
            tuple(linear.out_features for linear in linears),
        )
        parts = self._down(group.input, slots, rows, alpha)
        deltas = {}
        for part, b, path, width in zip(parts, slots.b, slots.paths, slots.out_features, strict=True):
            deltas[path] = ops.matmul(part, self._state(b, [self._rank, width]), False, False)
        for carrier in _carriers(group, targets):
            self._add_rows(carrier, [deltas[linear.path] for linear in carrier.linears], rows)
        return slots

    def finish(self) -> None:
        """Make the new inputs and states part of the model."""
        self._model.add_variables(self._variables)
        self._model.add_sinks(self._sinks)
        self._model.add_parameters(self._parameters)
        self._model.validate_nodes_and_infer_types()

    def _down(self, x: ov.Output, slots: LoraSlotGroup, rows: ov.Node, alpha: ov.Node) -> list[ov.Output]:
        count = len(slots.paths)
        flat = ops.reshape(ops.gather(x, rows, _index(0)), _index([-1, slots.in_features]), False)
        a = self._state(slots.a, [slots.in_features, count * self._rank])
        h = ops.multiply(ops.matmul(self._typed(flat), a, False, False), self._repeated(alpha, count))
        return ops.split(h, _index(1), count).outputs() if count > 1 else [h.output(0)]

    def _add_rows(self, carrier: Carrier, deltas: list[ov.Node], rows: ov.Node) -> None:
        delta = ops.concat(deltas, 1) if len(deltas) > 1 else deltas[0]
        wide = ops.unsqueeze(ops.convert(delta, "f32") if self._dtype != "f32" else delta, _index(1))
        y = carrier.output
        summed = ops.add(ops.gather(y, rows, _index(0)), wide)
        carrier.divert(ops.scatter_update(y, rows, summed, _index(0)).output(0))

    def _repeated(self, alpha: ov.Node, count: int) -> ov.Node:
        key = (alpha.get_name(), count)
        if key not in self._strengths:
            self._strengths[key] = ops.concat([alpha] * count, 1) if count > 1 else alpha
        return self._strengths[key]

    def _state(self, name: str, shape: list[int]) -> ov.Node:
        info = op_util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), _element_type(self._dtype), name
        variable = op_util.Variable(info)
        read = ops.read_value(ops.broadcast(self._typed_initial, _index(shape)), variable)
        self._variables.append(variable)
        self._sinks.append(ops.assign(read, variable))
        return read

    def _typed(self, node: ov.Node) -> ov.Node:
        return node if self._dtype == "f32" else ops.convert(node, self._dtype)


def insert_lora(
    model: ov.Model,
    groups: Collection[LinearGroup],
    targets: Collection[str],
    *,
    total_rank: int,
    dtype: str,
    head: str,
) -> LoraLayout:
    """Add LoRA states for the linears named in `targets` (module paths); `head` is the path of the last linear.

    Changes the model. `dtype` is "f32" or "bf16".
    """
    insertion = _Insertion(model, total_rank, dtype)
    inner = [group for group in groups if _targeted(group, targets) and group.linears[0].path != head]
    slots = []
    if inner:
        rows, alpha = insertion.rows(ROWS, ALPHA)
        slots = [insertion.add(group, targets, rows, alpha) for group in inner]
    last = [group for group in groups if _targeted(group, targets) and group.linears[0].path == head]
    if last:
        rows, alpha = insertion.rows(HEAD_ROWS, HEAD_ALPHA)
        slots += [insertion.add(group, targets, rows, alpha) for group in last]
    insertion.finish()
    return LoraLayout(total_rank, dtype, tuple(slots), head=bool(last))


def _targeted(group: LinearGroup, targets: Collection[str]) -> bool:
    return any(linear.path in targets for linear in group.linears)


def _carriers(group: LinearGroup, targets: Collection[str]) -> list[Carrier]:
    """Return what carries the outputs of the targeted linears, and of them only."""
    result = []
    for carrier in group.carriers:
        whole = all(linear.path in targets for linear in carrier.linears)
        parts = (carrier,) if whole else split_carrier(carrier)
        result += [part for part in parts if part.linears[0].path in targets]
    return result


def _index(value: int | list[int]) -> ov.Node:
    return ops.constant(np.array(value, np.int64))


def _element_type(dtype: str) -> ov.Type:
    return {"f32": ov.Type.f32, "bf16": ov.Type.bf16}[dtype]
