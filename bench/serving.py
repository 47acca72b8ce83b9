"""Serving: streams that are asked for in an open loop, at Poisson times, with a Zipf mix of adapters.

What the server can do is measured first, then the latencies at parts of that. A request is good when its first token
and its pace keep to the objective; goodput is how many of them end per second of arrivals.

python -m bench.serving --url http://127.0.0.1:8000/v1 --models sql,tools [--rate 2] [--seconds 30]

asks any server that streams completions, under the names that are given, most frequent first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.arrivals import poisson, zipf
from bench.part import Plan, Row
from bench.rounds import quantile
from bench.served import served, write_config
from bench.streams import Ask, Stream, stream_all
from bench.workload import base_linears, write_adapters

_RESIDENT = 8
_RANK = 8
_AT_ONCE = 32  # requests that show what the server can do
_LOADS = (0.5, 0.8)
# The objective: what readers of a stream take for prompt and fluent.
TTFT_SECONDS, TOKEN_SECONDS = 1.0, 0.1


def measure(model: Path, plan: Plan) -> list[Row]:
    """Serve with as many adapters as can be resident, unless the plan is short, and with many more; ask."""
    adapters = write_adapters(plan.folder, base_linears(model), plan.registered[-1], rank=_RANK)
    rows: list[Row] = []
    for count in (_RESIDENT, plan.registered[-1]) if plan.long else plan.registered[-1:]:
        names = list(adapters)[:count]
        some = {name: adapters[name] for name in names}
        config = write_config(plan.folder, model, some, max_loras=_RESIDENT, max_cpu_loras=count)
        with served("--config_path", str(config)) as url:
            rows += _at_loads(f"{url}/v1", names, plan)
    return rows


def _at_loads(url: str, models: Sequence[str], plan: Plan) -> list[Row]:
    stream_all(url, _asks(models, [0.0] * _AT_ONCE, plan.tokens, seed=1))  # warms up
    together = stream_all(url, _asks(models, [0.0] * _AT_ONCE, plan.tokens, seed=2))
    capacity = _AT_ONCE / max(stream.times[-1] for stream in together)
    return [
        {
            "registered": len(models),
            "resident": min(_RESIDENT, len(models)),
            "load": load,
            "capacity_per_second": capacity,
            **ask(url, models, rate=load * capacity, seconds=plan.serving_seconds, tokens=plan.tokens),
        }
        for load in _LOADS
    ]


def ask(url: str, models: Sequence[str], *, rate: float, seconds: float, tokens: int) -> Row:
    """Ask at `rate` per second; return the latencies."""
    times = poisson(rate, seconds)
    return _row(stream_all(url, _asks(models, times, tokens, seed=0)), rate, seconds)


def _asks(models: Sequence[str], times: Sequence[float], tokens: int, *, seed: int) -> list[Ask]:
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    chosen = zipf(len(times), len(models), seed=seed)
    return [
        Ask(
            at, {**body, "model": models[model], "prompt": f"{seed} {index}: write about number {index * 7919 % 1000}."}
        )
        for index, (at, model) in enumerate(zip(times, chosen, strict=True))
    ]


def _row(streams: Sequence[Stream], rate: float, seconds: float) -> Row:
    answered = [stream for stream in streams if stream.times]
    good = sum(_is_good(stream) for stream in answered)
    measures = {
        "ttft": [stream.ttft for stream in answered],
        "itl": [interval for stream in answered for interval in stream.intervals],
        "e2e": [stream.seconds for stream in answered],
    }
    latencies = {
        f"{name}_p{share}_ms": quantile(values, share / 100) * 1e3
        for name, values in measures.items()
        for share in (50, 95, 99)
    }
    ended = max((stream.times[-1] for stream in answered), default=seconds)
    return {
        "offered_per_second": rate,
        "requests": len(streams),
        "answered": len(answered),
        "good": good / len(streams) if streams else 0.0,
        "goodput_per_second": good / max(ended, seconds),
        **latencies,
    }


def _is_good(stream: Stream) -> bool:
    pace = sum(stream.intervals) / max(len(stream.intervals), 1)
    return stream.ttft <= TTFT_SECONDS and pace <= TOKEN_SECONDS


def main() -> None:
    """Ask a server that runs; print the latencies as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--url", required=True, help="up to the part that ends in /completions")
    parser.add_argument("--models", required=True, help="names of models or adapters, the most frequent first")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    found = ask(given.url, given.models.split(","), rate=given.rate, seconds=given.seconds, tokens=given.tokens)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
