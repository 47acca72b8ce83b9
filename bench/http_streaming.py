"""What HTTP costs: tokens per second of streams over a socket, against the same engine asked directly, in turn.

The server and its client are processes of their own; the engine that is asked directly is in this one.
"""

from __future__ import annotations

from pathlib import Path

from bench.batches import PROMPT_TOKENS, VOCABULARY, case
from bench.part import Plan, Row
from bench.rounds import spreads
from bench.served import served
from bench.streams import Ask, stream_all
from bench.workload import Server, prompts

_STREAMS = 16


def measure(model: Path, plan: Plan) -> list[Row]:
    """Measure both."""

    def over_http(number: int) -> float:
        asked = prompts(_STREAMS, PROMPT_TOKENS, vocabulary=VOCABULARY, seed=number)
        asks = [Ask(0, {**body, "prompt": prompt}) for prompt in asked]
        return _STREAMS * plan.tokens / max(stream.times[-1] for stream in stream_all(f"{url}/v1", asks))

    body = {"model": "m", "max_tokens": plan.tokens, "temperature": 0, "ignore_eos": True}
    with Server(model) as server, served("--model_path", str(model), "--model_name", "m") as url:
        directly = case(server, [None] * _STREAMS, plan.tokens)
        found = spreads(plan.in_turn({"engine": lambda number: directly(number).rate, "http": over_http}))
    return [
        {"case": name, "streams": _STREAMS, **spread.columns("tokens_per_second")} for name, spread in found.items()
    ]
