"""A graph of four linear layers with LoRA in it, small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from ovms_lora.adapters.adapter import Adapter, LoraPair
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.lora_graph import LoraForm, LoraLayout, insert_lora
from ovms_lora.engine.lora_rows import RowSpan, SequenceTiles, plan_tiles
from ovms_lora.engine.lora_states import LoraStates, host_dtype

Array = npt.NDArray[np.float32]
# path: [out, in]; q and v read the input, o reads q's output, and the head o's
SHAPES = {"m.q": (6, 4), "m.v": (3, 4), "m.o": (5, 6), "head": (7, 5)}
WEIGHTS: Mapping[str, Array] = {
    path: np.random.default_rng(len(path) + shape[0]).normal(size=shape).astype(np.float32)
    for path, shape in SHAPES.items()
}


def toy_model(*, bias: bool = False) -> ov.Model:
    """x [T, 1, 4] → v [T, 1, 3] and head [T, 1, 7]."""
    x = ops.parameter([-1, 1, 4], np.float32)
    x.output(0).set_names({"x"})

    def linear(path: str, source: ov.Node) -> ov.Node:
        node = ops.matmul(source, ops.constant(WEIGHTS[path]), False, True)
        node.set_friendly_name(f"__module.{path}/aten::linear/MatMul")
        return ops.add(node, ops.constant(np.float32(0.5))) if bias else node

    v = linear("m.v", x)
    head = linear("head", linear("m.o", linear("m.q", x)))
    results = [ops.result(v), ops.result(head)]
    return ov.Model(results, [x], "toy")


def adapter(ranks: Mapping[str, int], seed: int = 0, scaling: float = 2.0) -> Adapter:
    """An adapter with these ranks by path."""
    rng = np.random.default_rng(seed)

    def pair(path: str, rank: int) -> LoraPair:
        out, width = SHAPES[path]
        a, b = rng.normal(size=(rank, width)), rng.normal(size=(out, rank))
        return LoraPair(a.astype(np.float32), b.astype(np.float32), scaling)

    layers = {path: pair(path, rank) for path, rank in ranks.items()}
    return Adapter(str(seed), None, layers, np.dtype(np.float32))  # type: ignore[arg-type]  # no configuration


@dataclass(frozen=True, eq=False)
class Toy:
    """The compiled toy and its states."""

    model: ov.Model
    layout: LoraLayout
    request: ov.InferRequest
    states: LoraStates

    def beside(self) -> Toy:
        """Return another infer request of the same graph, without tiles."""
        request = self.request.get_compiled_model().create_infer_request()
        return replace(self, request=request, states=LoraStates(request, self.layout))

    def run(self, x: Array, uses: Mapping[int, SequenceTiles]) -> list[Array]:
        """Give v and head for x [T, 4]; the rows named in `uses` use these tiles."""
        spans = [RowSpan(row, 1, use) for row, use in uses.items()]
        empty = self.layout.form.zero_row
        plan = plan_tiles(spans, num_rows=len(x), held=self.states.held, may_be_empty=empty)
        feeds: dict[str, npt.NDArray[Any]] = {"x": x[:, None]}
        for names in (self.layout.rows, self.layout.head_rows):
            if names is None:
                continue
            feeds |= {names.tile_rows: plan.tile_rows, names.alpha: plan.alpha}
            feeds |= {names.place(chunks): plan.place(chunks) for chunks in names.chunks}
            if names.form.sums:
                feeds |= {names.sum_rows: plan.sum_rows, names.sum_alpha: plan.sum_alpha}
                feeds |= {names.sum_place(chunks): plan.sum_place(chunks) for chunks in names.chunks}
        for name, value in feeds.items():
            self.request.set_tensor(name, ov.Tensor(np.ascontiguousarray(value)))
        self.request.infer()
        return [self.request.get_output_tensor(index).data[:, 0].copy() for index in range(2)]


def toy(
    targets: Sequence[str] = tuple(SHAPES),
    *,
    tiles: int = 4,
    width: int = 2,
    dtype: str = "f32",
    sums: bool = True,
    zero_row: bool = False,
    device: str = "CPU",
    bias: bool = False,
) -> Toy:
    """Compile the toy with LoRA for the targets, with this many empty tiles."""
    model = toy_model(bias=bias)
    groups = group_linears(find_linears(model))
    form = LoraForm(width, dtype, sums=sums, zero_row=zero_row)
    layout = insert_lora(model, groups, targets, form, head="head")
    request = openvino_core().compile_model(model, device, {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    states = LoraStates(request, layout)
    states.resize(tiles)
    return Toy(model, layout, request, states)


def expected(x: Array, uses: Sequence[Sequence[tuple[Adapter, float]]], *, bias: bool = False) -> list[Array]:
    """What the toy must give when row i uses the adapters `uses[i]`."""
    results: list[list[Array]] = [[], []]
    for row, parts in zip(x, uses, strict=True):
        weights = {path: weight.astype(np.float64) for path, weight in WEIGHTS.items()}
        for each, alpha in parts:
            for path, pair in each.layers.items():
                weights[path] = weights[path] + alpha * pair.scaling * (pair.b.astype(np.float64) @ pair.a)
        shift = 0.5 if bias else 0.0
        results[0].append(weights["m.v"] @ row + shift)
        hidden = weights["m.o"] @ (weights["m.q"] @ row + shift) + shift
        results[1].append(weights["head"] @ hidden + shift)
    return [np.stack(rows).astype(np.float32) for rows in results]


def tolerance(dtype: str) -> float:
    """Relative to the largest value, after four products."""
    return 8 * float(np.finfo(np.float32).eps) * 16 if dtype == "f32" else 8 * 2.0**-8


def assert_close(found: Sequence[Array], wanted: Sequence[Array], dtype: str = "f32") -> None:
    """Compare outputs."""
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance(dtype) * np.abs(other).max())


def state(toy: Toy, name: str) -> Array:
    """The content of a state."""
    (found,) = [each for each in toy.request.query_state() if each.name == name]
    values: Array = found.state.data.view(host_dtype(toy.layout.form.dtype)).astype(np.float32)
    return values
