"""What adapters cost: tokens per second with different adapters in one batch, against the plain model.

Cases: `plain` (no runtime adapters), `base rows` (adapters registered, nobody uses one), `one adapter`, `mixed` (as
many adapters as given, one per row in turn), `half` (every other row is base), `64 registered` (the same ones used).
Also measured: bringing an adapter from host memory into its tile, against one decode step, and the memory of one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.workload import Server, base_linears, in_turn, prompts, rates, write_adapter
from ovms_lora.adapters.adapter import Adapter
from ovms_lora.core.request import AdapterUse

_MANY = 64


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `batch` rows of `prompt` tokens, `tokens` generated for each."""

    model: Path
    batch: int = 16
    tokens: int = 64
    prompt: int = 16
    adapters: int = 8
    rank: int = 16
    rounds: int = 5


def measure(options: Case, folder: Path) -> dict[str, Any]:
    """Run all cases; return their numbers."""
    base = base_linears(options.model)
    adapters = {
        f"a{index}": write_adapter(folder / f"a{index}", base, rank=options.rank, seed=index) for index in range(_MANY)
    }
    few = dict(list(adapters.items())[: options.adapters])
    first = dict(list(adapters.items())[:1])
    plain, one = Server(options.model), Server(options.model, first)
    mixed, many = Server(options.model, few, max_loras=len(few)), Server(options.model, adapters, max_loras=len(few))
    names = [f"a{index % options.adapters}" for index in range(options.batch)]
    asked = prompts(options.batch, options.prompt, vocabulary=1000)

    def case(server: Server, aliases: list[str | None]) -> Callable[[], float]:
        uses = [server.use(alias) if alias else () for alias in aliases]

        def run() -> float:
            tokens, seconds = server.run(asked, uses, max_tokens=options.tokens)
            return tokens / seconds

        return run

    nobody: list[str | None] = [None] * options.batch
    cases = {
        "plain": case(plain, nobody),
        "base rows": case(mixed, nobody),
        "one adapter": case(one, ["a0"] * options.batch),
        f"{options.adapters} mixed": case(mixed, list(names)),
        "half": case(mixed, [name if index % 2 else None for index, name in enumerate(names)]),
        f"{_MANY} registered": case(many, list(names)),
    }
    found = rates(in_turn(cases, options.rounds))
    for name, rate in found.items():
        print(
            f"{name:16s} {rate.median:8.1f} tokens/s  ({rate.low:.1f} to {rate.high:.1f})  {rate.ratio:6.3f} of plain"
        )
    step = options.batch / found["plain"].median
    moved = bring_in_seconds(mixed, list(few))
    print(f"bringing one adapter into its tile: {moved * 1e3:.1f} ms; a plain decode step: {step * 1e3:.1f} ms")
    bytes_of_one = host_bytes(mixed.use("a0"))
    for server in (plain, one, mixed, many):
        server.close()
    return {
        "model": options.model.name,
        "batch": options.batch,
        "tokens": options.tokens,
        "rank": options.rank,
        "cases": {name: asdict(rate) for name, rate in found.items()},
        "bring_in_seconds": moved,
        "plain_step_seconds": step,
        "host_bytes_per_adapter": bytes_of_one,
    }


def bring_in_seconds(server: Server, aliases: list[str]) -> float:
    """Return the median time that writing one adapter into its tile takes, on the engine's thread."""
    runtime = server.model.lora
    assert runtime and runtime.graphs.residency._states, "compiled with states"
    states = runtime.graphs.residency._states

    def write(use: AdapterUse) -> float:
        assert isinstance(use.adapter, Adapter), "loaded"
        begin = time.perf_counter()
        states.write(np.array([0]), use.adapter)
        return time.perf_counter() - begin

    uses = [server.use(alias)[0] for alias in aliases]
    return statistics.median(server.model.engine.call(lambda use=use: write(use)) for use in uses * 3)  # type: ignore[misc]


def host_bytes(uses: tuple[AdapterUse, ...]) -> int:
    """Return the bytes of an adapter's arrays in host memory."""
    adapter = uses[0].adapter
    assert isinstance(adapter, Adapter), "loaded"
    return sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.layers.values())
