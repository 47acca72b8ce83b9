"""The bounds of a decode step: the bytes that it has to read, the products that it has to compute, and this machine.

A step reads the weights of all linears once, the tiles of the resident adapters that it uses, and the keys and values
of its rows. It multiplies each row with each weight. Nothing can be faster than the slower of the two (the roofline of
Williams et al., 2009) at the rates measured here: memory read in a stream, and large products on the same device.

How far OpenVINO's kernels are from that is measured, too: a graph of nothing but the model's linears, for as many rows.
What a step takes above it is for us, for attention, and for the small layers between.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from bench.batches import PROMPT_TOKENS, case
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.workload import Server, base_linears, write_adapters
from ovms_lora.adapters.adapter import Adapter
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.paged_graph import read_paged_model

_READ_BYTES = 512 * 2**20  # beyond every cache
_READS = 5
_ADAPTERS = 8


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure what the machine does, then decode steps; return both, and how close they are."""
    adapters = write_adapters(plan.folder, base_linears(model), _ADAPTERS)
    weights, rows = weight_bytes(model), list[Row]()
    multiplied = sum(shape.out_features * shape.in_features for shape in base_linears(model).shapes.values())
    linears = Linears(model)
    with Server(model) as plain, Server(model, adapters, max_loras=_ADAPTERS) as mixed:
        one = adapter_bytes(mixed)
        for batch in plan.batches:
            names = [f"a{index % _ADAPTERS}" for index in range(batch)]
            cases: dict[str, Callable[[int], float]] = {
                "plain": _step_seconds(plain, [None] * batch, plan),
                f"{_ADAPTERS} mixed": _step_seconds(mixed, names, plan),
            }
            machine = Machine(read_bandwidth(), compute_rate())
            found = spreads(plan.in_turn(cases))
            alone = linears.seconds(batch)
            kept = batch * (PROMPT_TOKENS + plan.tokens / 2) * token_bytes(plain)
            for name, used in (("plain", 0), (f"{_ADAPTERS} mixed", min(batch, _ADAPTERS))):
                in_row = multiplied + (adapter_elements(mixed) if used else 0)
                work = Work(weights + used * one + kept, 2.0 * batch * in_row)
                rows.append(_row(name, batch, work, machine, found[name].median, alone))
    return rows


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine does in a second: bytes read from memory, and floating-point operations."""

    bytes: float
    operations: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do: bytes to read, and floating-point operations."""

    bytes: float
    operations: float


class Linears:
    """The linears of a model by themselves, joined as in the engine's graph."""

    def __init__(self, model: Path) -> None:
        groups = group_linears(find_linears(read_paged_model(openvino_core(), model)))
        outputs = [carrier.output for group in groups for carrier in group.carriers]
        inputs: dict[int, ov.Node] = {}
        for output in outputs:
            product = output.get_node().input(0)
            width = product.get_partial_shape()[2].get_length()
            if width not in inputs:
                inputs[width] = ov.opset13.parameter([-1, 1, width], np.float32)
            product.replace_source_output(inputs[width].output(0))
        graph = ov.Model([ov.opset13.result(output) for output in outputs], list(inputs.values()))
        self._request = openvino_core().compile_model(graph, "CPU").create_infer_request()
        self._widths = list(inputs)

    def seconds(self, rows: int) -> float:
        """Return how long they take for so many rows, the least of some times."""
        for index, width in enumerate(self._widths):
            self._request.set_input_tensor(index, ov.Tensor(np.ones((rows, 1, width), np.float32)))
        best = float("inf")
        for _ in range(2 * _READS):
            begin = time.perf_counter()
            self._request.infer()
            best = min(best, time.perf_counter() - begin)
        return best


def _row(name: str, batch: int, work: Work, machine: Machine, seconds: float, linears: float) -> Row:
    reading, computing = work.bytes / machine.bytes, work.operations / machine.operations
    return {
        "case": name,
        "batch": batch,
        "step_megabytes": work.bytes / 1e6,
        "gigabytes_per_second": machine.bytes / 1e9,
        "step_gigaflop": work.operations / 1e9,
        "gigaflop_per_second": machine.operations / 1e9,
        "step_ms": seconds * 1e3,
        "reading_ms": reading * 1e3,
        "computing_ms": computing * 1e3,
        "of_bound": max(reading, computing) / seconds,
        "linears_ms": linears * 1e3,
        "of_linears": linears / seconds,
    }


def _step_seconds(server: Server, aliases: Sequence[str | None], plan: Plan) -> Callable[[int], float]:
    run = case(server, aliases, plan.tokens)
    return lambda number: statistics.median(run(number).intervals)


def read_bandwidth() -> float:
    """Return the bytes per second that all cores together read from memory, streaming."""
    threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(_READ_BYTES // 8, np.int64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_READS):
            begin = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - begin)
    return max(_READ_BYTES / best, _device_bandwidth())


def _device_bandwidth() -> float:
    """Return the same of OpenVINO, which may read with wider instructions than numpy."""
    data = np.ones((256, _READ_BYTES // 1024), np.float32)
    shape = ov.opset13.parameter(list(data.shape), np.float32)
    largest = ov.opset13.reduce_max(shape, ov.opset13.constant(np.int64(1)))
    request = openvino_core().compile_model(ov.Model([largest], [shape]), "CPU").create_infer_request()
    request.set_input_tensor(ov.Tensor(data, shared_memory=True))
    best = float("inf")
    for _ in range(_READS):
        begin = time.perf_counter()
        request.infer()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def compute_rate() -> float:
    """Return the floating-point operations per second of large products, in the precision that the device infers in."""
    size = 1024
    rows = ov.opset13.parameter([size, size], np.float32)
    weight = ov.opset13.constant(np.full((size, size), 0.5, np.float32))
    product = ov.opset13.matmul(rows, weight, False, True)
    request = openvino_core().compile_model(ov.Model([product], [rows]), "CPU").create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ones((size, size), np.float32)))
    best = float("inf")
    for _ in range(2 * _READS):
        begin = time.perf_counter()
        request.infer()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def weight_bytes(model: Path) -> int:
    """Return the bytes of all constants that the linears of an IR are made of."""
    constants: dict[str, int] = {}
    for linear in find_linears(read_paged_model(openvino_core(), model)):
        waiting = [linear.node.input_value(1).get_node()]
        while waiting:
            node = waiting.pop()
            if node.get_type_name() == "Constant":
                constants[node.get_friendly_name()] = node.get_byte_size()
            waiting += [value.get_node() for value in node.input_values()]
    return sum(constants.values())


def adapter_elements(server: Server) -> int:
    """Return the numbers of one adapter: what a row that uses it is multiplied with."""
    (use,) = server.use("a0")
    assert isinstance(use.adapter, Adapter), "loaded"
    return sum(pair.a.size + pair.b.size for pair in use.adapter.layers.values())


def adapter_bytes(server: Server) -> int:
    """Return the bytes that one adapter takes in the states, which have the type of the host's copy."""
    (use,) = server.use("a0")
    assert isinstance(use.adapter, Adapter), "loaded"
    return sum(pair.a.nbytes + pair.b.nbytes for pair in use.adapter.layers.values())


def token_bytes(server: Server) -> float:
    """Return the bytes of keys and values of one token."""
    runner = server.model.engine._runner
    cache = getattr(runner, "_cache", {})
    return float(sum(tensor.byte_size for tensor in cache.values())) / (runner.num_blocks * runner.block_size)
