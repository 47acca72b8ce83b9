"""The LoRA part of the graph: every row its own adapters, as a few small batched products.

Resident adapters stand in *tiles* of `width` rank rows, S of them at present. For n linears that read one input
x [T, 1, in] and whose outputs lie side by side in y [T, 1, C·c], in C chunks of c columns:

    xs = x[tile_rows]             tile_rows int32 [m1, S, m2]: the token rows that use each tile, m1·m2 at most
    h  = xs · A                   A [n·S, in, width]      h [m1, n·S, m2, width]
    d  = h[linear of chunk] · B   B [C·S, width, c]       d [m1, C·S, m2, c]
    y += alpha ⊙ d[place]         place int32 [T, C]: where in d a row's part stands, or one past its end for nothing

`alpha` f32 [T, 1, 1] is a row's strength; the adapters' own scaling is part of B. A row that uses several tiles gets
the others by a second sum over `sum_rows` and `sum_place`, which is in the graph only where it is asked for (`sums`).
A and B are state variables that `lora_states` fills; S is a dynamic dimension, so more adapters need no other graph.

Two things about the CPU device decide the form. A MatMul whose weight is a state with a *constant* initial value
becomes a fully connected layer, which packs that weight once and never looks at the state again; so the initial value
comes from a parameter, and is empty. And every node costs about 2 µs even with nothing to do; so there are few.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
from openvino import opset13, opset15
from openvino.op import util as op_util

from ovms_lora.engine.linears import Carrier, LinearGroup, split_carrier

ROWS, HEAD_ROWS = "lora", "lora_head"  # the two sets of inputs: for all tokens, and for those whose logits are taken
EMPTY = "lora_empty"

_MAX_CHUNKS = 16  # for linears of more awkward widths than these, each has its own products


@dataclass(frozen=True, slots=True)
class LoraForm:
    """How the part is built: tiles of `width` rank rows, states of `dtype` ("f32" or "bf16").

    `sums` lets a row use several tiles. `zero_row` puts a row of zeros behind d. Without it an index past the end has
    to give zeros, as it does on the CPU device as long as d is not empty; and every step has to use some tile.
    """

    width: int
    dtype: str
    sums: bool = True
    zero_row: bool = False


@dataclass(frozen=True, slots=True)
class RowInputs:
    """The names of the inputs that say which rows use which tiles."""

    prefix: str
    chunks: tuple[int, ...]
    form: LoraForm

    @property
    def tile_rows(self) -> str:
        """int32 [m1, S, m2]."""
        return f"{self.prefix}_tile_rows"

    @property
    def alpha(self) -> str:
        """f32 [T, 1, 1]."""
        return f"{self.prefix}_alpha"

    def place(self, chunks: int) -> str:
        """int32 [T, chunks]."""
        return f"{self.prefix}_place.{chunks}"

    @property
    def sum_rows(self) -> str:
        """int32 [E, 1]: the rows that get another part."""
        return f"{self.prefix}_sum_rows"

    @property
    def sum_alpha(self) -> str:
        """f32 [E, 1, 1]."""
        return f"{self.prefix}_sum_alpha"

    def sum_place(self, chunks: int) -> str:
        """int32 [E, chunks]."""
        return f"{self.prefix}_sum_place.{chunks}"


@dataclass(frozen=True, slots=True)
class LoraSlotGroup:
    """One group's states: `a` for all its linears in the order of `paths`, `b` for all chunks of their outputs.

    `owners[j]` is the linear, by its place in `paths`, that chunk j belongs to; every chunk has `chunk_width` columns.
    """

    a: str
    b: str
    paths: tuple[str, ...]
    in_features: int
    owners: tuple[int, ...]
    chunk_width: int

    def owner_input(self) -> str | None:
        """The input int32 [C·S] that repeats h for each chunk; None where chunks and linears are the same."""
        if len(self.owners) == len(self.paths):
            return None
        return "lora_owners." + "".join(f"{self.owners.count(index)}." for index in range(len(self.paths)))


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """What was inserted: its form, the groups, and the inputs that say which rows use what.

    `rows` are the inputs of all layers but the one that makes logits, `head_rows` that one's; None without such layers.
    """

    form: LoraForm
    groups: tuple[LoraSlotGroup, ...]
    rows: RowInputs | None
    head_rows: RowInputs | None

    @property
    def paths(self) -> frozenset[str]:
        """The linears that can take a LoRA."""
        return frozenset(path for group in self.groups for path in group.paths)

    @property
    def tile_weights(self) -> int:
        """The numbers in one tile, of A and B together."""
        return sum(
            self.form.width * (len(group.paths) * group.in_features + len(group.owners) * group.chunk_width)
            for group in self.groups
        )


class _Parameters:
    """The inputs that are added to a model, each made when first asked for."""

    def __init__(self) -> None:
        self.made: dict[str, ov.Node] = {}

    def get(self, name: str, shape: list[int], dtype: type[np.generic]) -> ov.Node:
        if name not in self.made:
            parameter = opset13.parameter(shape, dtype)
            parameter.output(0).set_names({name})
            self.made[name] = parameter
        return self.made[name]


class _RowNodes:
    """The inputs of one set of rows, in the forms that groups need."""

    def __init__(self, prefix: str, parameters: _Parameters, form: LoraForm) -> None:
        self._names = RowInputs(prefix, (), form)
        self._parameters = parameters
        self._tile_rows: dict[int, ov.Node] = {}
        self._chunks: set[int] = set()

    def names(self) -> RowInputs:
        return replace(self._names, chunks=tuple(sorted(self._chunks)))

    def tile_rows(self, linears: int) -> ov.Node:
        """Give tile_rows once for each linear: [m1, linears·S, m2]."""
        if linears not in self._tile_rows:
            rows = self._parameters.get(self._names.tile_rows, [-1, -1, -1], np.int32)
            self._tile_rows[linears] = opset13.concat([rows] * linears, 1) if linears > 1 else rows
        return self._tile_rows[linears]

    def add(self, y: ov.Output, d: ov.Node, chunks: int) -> ov.Node:
        """Add each row's part of d [positions·chunks, c] to y [T, 1, chunks·c]."""
        self._chunks.add(chunks)
        get, names = self._parameters.get, self._names
        place, alpha = get(names.place(chunks), [-1, chunks], np.int32), get(names.alpha, [-1, 1, 1], np.float32)
        result = opset13.add(y, _part(d, place, alpha, chunks))
        if names.form.sums:
            place = get(names.sum_place(chunks), [-1, chunks], np.int32)
            alpha = get(names.sum_alpha, [-1, 1, 1], np.float32)
            more = _part(d, place, alpha, chunks)
            result = opset15.scatter_nd_update(result, get(names.sum_rows, [-1, 1], np.int32), more, "sum")
        return result


class _Insertion:
    """Adds the nodes to one model."""

    def __init__(self, model: ov.Model, form: LoraForm) -> None:
        self._model, self._form = model, form
        self._parameters = _Parameters()
        self._variables: list[op_util.Variable] = []
        self._sinks: list[ov.Node] = []
        self._empty = self._typed(self._parameters.get(EMPTY, [-1, 1, 1], np.float32))

    def row_nodes(self, prefix: str) -> _RowNodes:
        return _RowNodes(prefix, self._parameters, self._form)

    def add(self, carrier: Carrier, rows: _RowNodes) -> LoraSlotGroup:
        """Add the LoRA of a carrier's linears."""
        slots = _slots(carrier)
        x, linears, chunks = carrier.linears[0].node.input_value(0), len(slots.paths), len(slots.owners)
        xs = opset13.reshape(
            opset13.gather(x, rows.tile_rows(linears), _index(0)), _index([0, 0, -1, slots.in_features]), True
        )
        h = opset13.matmul(self._typed(xs), self._state(slots.a, [slots.in_features, self._form.width]), False, False)
        owners = slots.owner_input()
        if owners:
            h = opset13.gather(h, self._parameters.get(owners, [-1], np.int32), _index(1))
        d = opset13.matmul(h, self._state(slots.b, [self._form.width, slots.chunk_width]), False, False)
        flat = opset13.reshape(d, _index([-1, slots.chunk_width]), False)
        if self._form.zero_row:
            flat = opset13.concat(
                [flat, self._typed(opset13.constant(np.zeros((1, slots.chunk_width), np.float32)))], 0
            )
        carrier.divert(rows.add(carrier.output, flat, chunks).output(0))
        return slots

    def finish(self) -> None:
        """Make the new inputs and states part of the model."""
        self._model.add_variables(self._variables)
        self._model.add_sinks(self._sinks)
        self._model.add_parameters(list(self._parameters.made.values()))
        self._model.validate_nodes_and_infer_types()

    def _state(self, name: str, shape: list[int]) -> ov.Node:
        """A state [-1, *shape]."""
        info = op_util.VariableInfo()
        info.data_shape, info.data_type = ov.PartialShape([-1, *shape]), _element_type(self._form.dtype)
        info.variable_id = name
        variable = op_util.Variable(info)
        initial = opset13.broadcast(self._empty, _index([1, *shape]), broadcast_spec="BIDIRECTIONAL")
        read = opset13.read_value(initial, variable)
        self._variables.append(variable)
        self._sinks.append(opset13.assign(read, variable))
        return read

    def _typed(self, node: ov.Node) -> ov.Node:
        return node if self._form.dtype == "f32" else opset13.convert(node, self._form.dtype)


def insert_lora(
    model: ov.Model, groups: Collection[LinearGroup], targets: Collection[str], form: LoraForm, *, head: str
) -> LoraLayout:
    """Add LoRA states for the linears named in `targets` (module paths); `head` is the path of the last linear.

    Changes the model.
    """
    insertion = _Insertion(model, form)
    inner, last = insertion.row_nodes(ROWS), insertion.row_nodes(HEAD_ROWS)
    slots: list[LoraSlotGroup] = []
    used: set[str] = set()
    for group in groups:
        for carrier in _carriers(group, targets):
            of_head = carrier.linears[0].path == head
            slots.append(insertion.add(carrier, last if of_head else inner))
            used.add(HEAD_ROWS if of_head else ROWS)
    insertion.finish()
    return LoraLayout(
        form,
        tuple(slots),
        inner.names() if ROWS in used else None,
        last.names() if HEAD_ROWS in used else None,
    )


def _carriers(group: LinearGroup, targets: Collection[str]) -> list[Carrier]:
    """Return what carries the outputs of the targeted linears, and of them only."""
    result = []
    for carrier in group.carriers:
        whole = all(linear.path in targets for linear in carrier.linears)
        together = whole and len(_slots(carrier).owners) <= _MAX_CHUNKS
        parts = (carrier,) if together else split_carrier(carrier)
        result += [part for part in parts if part.linears[0].path in targets]
    return result


def _slots(carrier: Carrier) -> LoraSlotGroup:
    paths = tuple(linear.path for linear in carrier.linears)
    widths = [linear.out_features for linear in carrier.linears]
    chunk = math.gcd(*widths)
    owners = tuple(index for index, width in enumerate(widths) for _ in range(width // chunk))
    name = "+".join(paths)
    return LoraSlotGroup(f"lora_A.{name}", f"lora_B.{name}", paths, carrier.linears[0].in_features, owners, chunk)


def _part(d: ov.Node, place: ov.Node, alpha: ov.Node, chunks: int) -> ov.Node:
    """Give alpha ⊙ d[place] as [rows, 1, chunks·c]; f32, whatever d is."""
    width = d.get_output_partial_shape(0)[1].get_length()
    part = opset13.gather(d, place, _index(0))
    if chunks > 1:
        part = opset13.reshape(part, _index([-1, 1, chunks * width]), False)
    if part.get_output_element_type(0) != ov.Type.f32:
        part = opset13.convert(part, "f32")
    return opset13.multiply(part, alpha)


def _index(value: int | list[int]) -> ov.Node:
    return opset13.constant(np.array(value, np.int64))


def _element_type(dtype: str) -> ov.Type:
    return {"f32": ov.Type.f32, "bf16": ov.Type.bf16}[dtype]
