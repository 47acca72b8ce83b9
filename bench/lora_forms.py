"""Three ways to give every row of a batch its own adapter: the same weights and inputs, one after the other in rounds.

    base       the linears alone
    loop       for each row a product with its adapter's A and B, one row after another
    gathered   each row's A and B are copied side by side, then multiplied in one batched product
    tiled      the form of engine/lora_graph.py: each resident adapter is read once, with the rows that use it

All are compiled OpenVINO graphs of the linears of four decoder blocks of the model's shape (linear_stack.py), in the
precision that the device infers in; 8 adapters of rank 16 on all linears, rows use them in turn. The loop is the best
one: unrolled for its number of rows, it reads the adapters where they are. Baselines of S-LoRA and Punica.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import openvino as ov
from openvino import opset13 as ops

from bench.linear_stack import FloatArray, LinearStack
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.workload import base_linears
from ovms_lora.adapters.adapter import Adapter, LoraPair
from ovms_lora.adapters.peft_config import parse_peft_config
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.graph_source import GraphSource
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.lora_graph import LoraForm, LoraLayout, insert_lora
from ovms_lora.engine.lora_rows import RowSpan, SequenceTiles, TileSet, plan_tiles
from ovms_lora.engine.lora_states import LoraStates
from ovms_lora.engine.model import read_options

_BLOCKS = 4
_ADAPTERS = 8
_RANK = 16
_REPEATS = 10  # steps of one run
_TOLERANCE = 0.05  # of the largest value: bf16 rounds in other places in each form

Weights = Mapping[str, LoraPair]
Form = Callable[[FloatArray], FloatArray]


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure the forms at each size of batch, and see that they compute the same."""
    stack = LinearStack(base_linears(model), _BLOCKS)
    adapters = [_random(stack, seed) for seed in range(_ADAPTERS)]
    dtype = GraphSource(*read_options(model)).inference_dtype
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for batch in sorted({1, 2, 4, 8, 16, 32, 64} & {*range(max(plan.batches) + 1)}):
        x = rng.standard_normal((batch, 1, stack.width), np.float32)
        forms: dict[str, Form] = {
            "base": _base(stack),
            "loop": _loop(stack, adapters, batch, dtype),
            "gathered": _gathered(stack, adapters, batch, dtype),
            "tiled": _tiled(stack, adapters, batch, dtype),
        }
        _check_same({name: form(x) for name, form in forms.items()})
        found = spreads(plan.in_turn({name: _timed(form, x) for name, form in forms.items()}))
        rows += [{"form": name, "batch": batch, **spread.columns("step_ms")} for name, spread in found.items()]
    return rows


def _timed(form: Form, x: FloatArray) -> Callable[[int], float]:
    def run(_: int) -> float:
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            form(x)
        return (time.perf_counter() - begin) / _REPEATS * 1e3

    return run


def _check_same(found: Mapping[str, FloatArray]) -> None:
    """See that all forms agree, and that they differ from the base: a form that does nothing is fast."""
    right = found["loop"]
    bound = _TOLERANCE * np.abs(right).max()
    for name, values in found.items():
        agrees = bool(np.abs(values - right).max() <= bound)
        if agrees != (name != "base"):
            raise SystemExit(f"error: {name} {'agrees' if agrees else 'disagrees'} with the loop over rows")


def _random(stack: LinearStack, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        path: LoraPair(
            rng.standard_normal((_RANK, width), np.float32) / np.float32(np.sqrt(width)),
            rng.standard_normal((out, _RANK), np.float32) / np.float32(np.sqrt(_RANK)),
            1.0,
        )
        for path, (out, width) in stack.shapes.items()
    }


def _base(stack: LinearStack) -> Form:
    return _infer(_request(stack.model(lambda _path, _x, y: y, {})))


def _loop(stack: LinearStack, adapters: list[Weights], batch: int, dtype: str) -> Form:
    parameters: dict[str, ov.Node] = {}
    values: dict[str, FloatArray] = {}
    for index in range(min(batch, _ADAPTERS)):
        for path in stack.paths:
            pair = adapters[index][path]
            for name, array in ((f"{path}.A{index}", pair.a.T), (f"{path}.B{index}", pair.b.T)):
                parameters[name], values[name] = ops.parameter(list(array.shape), _type(dtype)), array

    def after(path: str, x: ov.Node, y: ov.Node) -> ov.Node:
        parts = []
        split = ops.split(_typed(x, dtype), ops.constant(np.int64(0)), batch) if batch > 1 else None
        for row in range(batch):
            own = split.output(row) if split else _typed(x, dtype)
            a, b = (parameters[f"{path}.{part}{row % _ADAPTERS}"] for part in "AB")
            parts.append(ops.matmul(ops.matmul(own, a, False, False), b, False, False))
        return _sum(y, ops.concat(parts, 0))

    return _infer(_request(stack.model(after, parameters), values, dtype))


def _gathered(stack: LinearStack, adapters: list[Weights], batch: int, dtype: str) -> Form:
    values: dict[str, FloatArray] = {}
    parameters: dict[str, ov.Node] = {"index": ops.parameter([-1], np.int32)}
    for path in stack.paths:
        for part in "AB":
            arrays = [getattr(adapter[path], part.lower()).T for adapter in adapters]
            name = f"{path}.{part}"
            values[name] = np.stack(arrays)
            parameters[name] = ops.parameter(list(values[name].shape), _type(dtype))

    def after(path: str, x: ov.Node, y: ov.Node) -> ov.Node:
        a, b = (ops.gather(parameters[f"{path}.{part}"], parameters["index"], np.int64(0)) for part in "AB")
        return _sum(y, ops.matmul(ops.matmul(_typed(x, dtype), a, False, False), b, False, False))

    request = _request(stack.model(after, parameters), values, dtype)
    request.set_tensor("index", ov.Tensor(np.arange(batch, dtype=np.int32) % _ADAPTERS))
    return _infer(request)


def _tiled(stack: LinearStack, adapters: list[Weights], batch: int, dtype: str) -> Form:
    model = stack.model(lambda _path, _x, y: y, {})
    form = LoraForm(_RANK, dtype, sums=False)
    layout = insert_lora(model, group_linears(find_linears(model)), stack.paths, form, head="")
    request = _request(model)
    states = LoraStates(request, layout)
    used = min(batch, _ADAPTERS)
    states.resize(used)
    config = parse_peft_config(b'{"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}')
    for index in range(used):
        states.write(np.array([index]), Adapter(str(index), config, adapters[index], np.dtype(np.float32)))
    _set_rows(request, layout, batch, used)
    return _infer(request)


def _set_rows(request: ov.InferRequest, layout: LoraLayout, batch: int, used: int) -> None:
    one = np.ones(1, np.float32)
    spans = [RowSpan(row, 1, SequenceTiles(np.array([row % used]), one)) for row in range(batch)]
    plan = plan_tiles(spans, num_rows=batch, held=TileSet(used), may_be_empty=False)
    names = layout.rows
    assert names, "there are layers with LoRA"
    request.set_tensor(names.tile_rows, ov.Tensor(plan.tile_rows))
    request.set_tensor(names.alpha, ov.Tensor(plan.alpha))
    for chunks in names.chunks:
        request.set_tensor(names.place(chunks), ov.Tensor(plan.place(chunks)))


def _request(model: ov.Model, values: Mapping[str, FloatArray] | None = None, dtype: str = "f32") -> ov.InferRequest:
    request = openvino_core().compile_model(model, "CPU").create_infer_request()
    for name, array in (values or {}).items():
        request.set_tensor(name, _tensor(array, dtype))
    return request


def _infer(request: ov.InferRequest) -> Form:
    def run(x: FloatArray) -> FloatArray:
        request.set_tensor("x", ov.Tensor(x, shared_memory=True))
        request.infer()
        found: FloatArray = request.get_output_tensor(0).data.copy()
        return found

    return run


def _tensor(array: FloatArray, dtype: str) -> ov.Tensor:
    tensor = ov.Tensor(_type(dtype), ov.Shape(list(array.shape)))
    numpy_type: Any = np.float32 if dtype == "f32" else ml_dtypes.bfloat16
    tensor.data.view(numpy_type)[...] = array
    return tensor


def _type(dtype: str) -> ov.Type:
    return {"f32": ov.Type.f32, "bf16": ov.Type.bf16}[dtype]


def _typed(node: ov.Node, dtype: str) -> ov.Node:
    return node if dtype == "f32" else ops.convert(node, dtype)


def _sum(y: ov.Node, d: ov.Node) -> ov.Node:
    return ops.add(y, d if d.get_output_element_type(0) == ov.Type.f32 else ops.convert(d, "f32"))
