"""What an adapter costs while a prompt is read: time to the first token of one prompt of 480 tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.batches import case
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.workload import Server, base_linears, write_adapters

_PROMPT = 480


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure both, in prompt tokens per second."""
    adapters = write_adapters(plan.folder, base_linears(model), 1)
    with Server(model) as plain, Server(model, adapters, max_loras=1) as adapted:
        cases = {"plain": _rate(plain, None), "one adapter": _rate(adapted, "a0")}
        found = spreads(plan.in_turn(cases))
    return [
        {"case": name, "prompt": _PROMPT, **spread.columns("prompt_tokens_per_second")}
        for name, spread in found.items()
    ]


def _rate(server: Server, alias: str | None) -> Callable[[int], float]:
    run = case(server, [alias], tokens=1, length=_PROMPT)
    return lambda number: _PROMPT / run(number).first_token_times[0]
