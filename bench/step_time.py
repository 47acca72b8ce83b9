"""What a step is made of: the time in the device, and the time of our Python between two uses of it.

Python that runs while the device works is not counted: it costs nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import openvino as ov

from bench.batches import case
from bench.part import Plan, Row
from bench.workload import Server, base_linears, write_adapters

_ADAPTERS = 8

Use = tuple[float, float]  # when the device began and ended


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure plain steps and steps with adapters."""
    adapters = write_adapters(plan.folder, base_linears(model), _ADAPTERS)
    rows: list[Row] = []
    with Server(model) as plain, Server(model, adapters, max_loras=_ADAPTERS) as mixed:
        for batch in plan.batches:
            names = [f"a{index % _ADAPTERS}" for index in range(batch)]
            cases = {
                "plain": _timed(case(plain, [None] * batch, plan.tokens)),
                f"{_ADAPTERS} mixed": _timed(case(mixed, names, plan.tokens)),
            }
            found = plan.in_turn(cases)
            rows += [_row(name, batch, [step for steps in runs for step in steps]) for name, runs in found.items()]
    return rows


@contextmanager
def device_uses() -> Iterator[list[Use]]:
    """Note when each inference begins and ends, whatever asks for it, as long as the block runs."""
    uses: list[Use] = []
    start, wait = ov.InferRequest.start_async, ov.InferRequest.wait
    begun = 0.0

    def timed_start(request: ov.InferRequest, *arguments: Any, **options: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()
        start(request, *arguments, **options)

    def timed_wait(request: ov.InferRequest) -> None:
        wait(request)
        uses.append((begun, time.perf_counter()))

    ov.InferRequest.start_async, ov.InferRequest.wait = timed_start, timed_wait
    try:
        yield uses
    finally:
        ov.InferRequest.start_async, ov.InferRequest.wait = start, wait


def _timed(run: Callable[[int], object]) -> Callable[[int], list[tuple[float, float]]]:
    def timed(number: int) -> list[tuple[float, float]]:
        with device_uses() as uses:
            run(number)
        return steps(uses)

    return timed


def steps(uses: Sequence[Use]) -> list[tuple[float, float]]:
    """Return for each step how long it took, to the begin of the next one, and how much of that in the device."""
    return [(after - begin, end - begin) for (begin, end), (after, _) in pairwise(uses)]


def _row(name: str, batch: int, found: Sequence[tuple[float, float]]) -> Row:
    step, device = (statistics.median(values) for values in zip(*found, strict=True))
    outside = statistics.median((whole - inside) / whole for whole, inside in found)
    return {
        "case": name,
        "batch": batch,
        "step_ms": step * 1e3,
        "device_ms": device * 1e3,
        "python_share": outside,
    }
