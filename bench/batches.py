"""What a batch costs: throughput and latency by its size, plain and with adapters.

plain          a server without runtime adapters
base rows      adapters are registered, nobody uses one
one adapter    all rows use the only one that is registered
N mixed        one of N adapters per row, in turn
half           every other row is base, the others use one of 8 adapters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from bench.part import Plan, Row
from bench.rounds import quantile, spreads
from bench.workload import Run, Server, base_linears, prompts, write_adapters

PROMPT_TOKENS = 16
VOCABULARY = 250  # the smallest of the models has 300 tokens
_FEW = 8
_MIXES = (2, 4, 8, 16, 32)

Case = Callable[[int], Run]


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure all cases of each batch size."""
    mixes = _MIXES if plan.long else (_FEW,)
    adapters = write_adapters(plan.folder, base_linears(model), max(mixes))
    rows: list[Row] = []
    with ExitStack() as stack:
        plain = stack.enter_context(Server(model))
        mixed = {
            count: stack.enter_context(Server(model, dict(islice(adapters.items(), count)), max_loras=count))
            for count in sorted({1, _FEW, *mixes})
            if count <= max(*plan.batches, _FEW)
        }
        for batch in plan.batches:
            rows += _rows(batch, plan.in_turn(_cases(batch, plain, mixed, plan.tokens)))
    return rows


def _cases(batch: int, plain: Server, mixed: Mapping[int, Server], tokens: int) -> dict[str, Case]:
    nobody: list[str | None] = [None] * batch
    few = [f"a{index % _FEW}" for index in range(batch)]
    cases = {
        "plain": case(plain, nobody, tokens),
        "base rows": case(mixed[_FEW], nobody, tokens),
        "one adapter": case(mixed[1], ["a0"] * batch, tokens),
    }
    for count, server in mixed.items():
        if 1 < count <= batch:
            cases[f"{count} mixed"] = case(server, [f"a{index % count}" for index in range(batch)], tokens)
    if batch > 1:
        half = [name if index % 2 else None for index, name in enumerate(few)]
        cases["half"] = case(mixed[_FEW], half, tokens)
    return cases


def case(server: Server, aliases: Sequence[str | None], tokens: int, *, length: int = PROMPT_TOKENS) -> Case:
    """Return what asks a server for rows with these adapters; each round has prompts of its own."""
    uses = [server.use(alias) if alias else () for alias in aliases]

    def run(number: int) -> Run:
        asked = prompts(len(uses), length, vocabulary=VOCABULARY, seed=number)
        return server.run(asked, uses, max_tokens=tokens)

    return run


def _rows(batch: int, found: Mapping[str, Sequence[Run]]) -> list[Row]:
    rates = spreads({name: [run.rate for run in runs] for name, runs in found.items()})
    rows: list[Row] = []
    for name, runs in found.items():
        first = [seconds for run in runs for seconds in run.first_token_times]
        between = [seconds for run in runs for seconds in run.intervals]
        rows.append(
            {
                "batch": batch,
                "case": name,
                **rates[name].columns("tokens_per_second"),
                "step_ms": quantile(between, 0.5) * 1e3,
                "itl_p95_ms": quantile(between, 0.95) * 1e3,
                "ttft_p50_ms": quantile(first, 0.5) * 1e3,
                "ttft_p95_ms": quantile(first, 0.95) * 1e3,
            }
        )
    return rows
