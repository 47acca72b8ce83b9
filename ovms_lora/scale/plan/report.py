"""What `ovms-lora plan` prints: a table for people, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from ovms_lora.scale.plan.capacity import Plan, Scenario
from ovms_lora.scale.plan.memory import MemoryUse
from ovms_lora.scale.plan.outcome import Goal, Outcome


def as_json(plan: Plan, scenario: Scenario, goals: Sequence[Goal]) -> str:
    """Return one JSON object: what was asked, the replicas needed, the outcomes, and the memory of a replica."""
    workload, popularity = scenario.workload, scenario.workload.popularity
    memory = MemoryUse.of(scenario.profile, scenario.limits, workload)
    report = {
        "model": scenario.profile.model,
        "workload": {
            "arrival_rate": workload.rate,
            "adapters": len(popularity.shares),
            "base_share": workload.base_share,
            "prompt_tokens": workload.prompts.text,
            "output_tokens": workload.outputs.text,
        },
        "limits": asdict(scenario.limits),
        "goals": [asdict(goal) for goal in goals],
        "replicas_needed": plan.needed,
        "outcomes": [outcome.as_json() for outcome in plan.outcomes],
        "memory_per_replica": {**asdict(memory), "total": memory.total},
        "seed": scenario.seed,
    }
    return json.dumps(report, indent=2)


def as_table(plan: Plan, scenario: Scenario, *, max_replicas: int) -> Iterator[str]:
    """Yield lines: replicas needed, a column for each outcome, and the memory of a replica."""
    for routing, needed in plan.needed.items():
        yield f"{routing} routing needs {needed or f'more than {max_replicas}'} replicas"
    if plan.needed:
        yield ""
    columns = [_names(), *(_column(outcome) for outcome in plan.outcomes)]
    widths = [max(map(len, column)) for column in columns]
    for first, *others in zip(*columns, strict=True):
        cells = [other.rjust(width) for other, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])
    memory = MemoryUse.of(scenario.profile, scenario.limits, scenario.workload)
    yield ""
    yield (
        f"memory of a replica: {_gb(memory.total)} (model {_gb(memory.base)}, KV cache {_gb(memory.kv_cache)}, "
        f"{scenario.limits.max_loras} adapters in the graph {_gb(memory.resident)}, "
        f"{scenario.limits.max_cpu_loras} in host memory {_gb(memory.host)})"
    )
    for outcome in plan.outcomes:
        if outcome.overloaded:
            yield (
                f"{outcome.replicas} replicas with {outcome.routing} routing are overloaded: latencies grow as long as "
                "the load goes on"
            )


def _names() -> list[str]:
    latencies = [f"{what} {quantile}" for what in ("first token", "whole answer") for quantile in ("p50", "p95", "p99")]
    tiers = ["adapter in the graph", "adapter in host memory", "adapter on disk"]
    return ["routing", "replicas", *latencies, *tiers, "tokens/s", "busy"]


def _column(outcome: Outcome) -> list[str]:
    ttft, e2e, hits = outcome.ttft, outcome.e2e, outcome.hits
    seconds = (ttft.p50, ttft.p95, ttft.p99, e2e.p50, e2e.p95, e2e.p99)
    return [
        outcome.routing,
        str(outcome.replicas),
        *(f"{value:.3f} s" for value in seconds),
        *(f"{100 * share:.1f} %" for share in (hits.resident, hits.host, hits.disk)),
        f"{outcome.tokens_per_second:.0f}",
        f"{100 * outcome.busy:.0f} %",
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
