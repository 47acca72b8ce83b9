"""Outcome: what a simulation comes to, and whether that meets the goals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovms_lora.core.errors import UsageError
from ovms_lora.scale.plan.adapter_tiers import Tier
from ovms_lora.scale.plan.simulation import Routing, Simulated

_WARM_UP = 0.2  # of the requests find caches that are still empty, and do not count


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles over requests, in seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> Latency:
        """Return the quantiles of so many requests."""
        return cls(*(float(value) for value in np.quantile(seconds, (0.5, 0.95, 0.99))))


@dataclass(frozen=True, slots=True)
class HitRates:
    """Shares of the requests with an adapter that found it in the graph, in host memory, or on disk; sum 1 (or 0)."""

    resident: float
    host: float
    disk: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What so many replicas do. `busy`: the share of time in which they compute; `overloaded`: the queue only grew."""

    routing: Routing
    replicas: int
    ttft: Latency
    e2e: Latency
    hits: HitRates
    tokens_per_second: float
    busy: float
    overloaded: bool

    @classmethod
    def of(cls, simulated: Simulated, routing: Routing, *, capacity: int, overhead: float) -> Outcome:
        """Sum up what was simulated, without its beginning; `capacity` is how many requests all replicas take.

        `overhead` seconds are added to each latency.
        """
        traffic, record = simulated.traffic, simulated.record
        begin = int(len(traffic.arrivals) * _WARM_UP)
        arrivals = np.array(traffic.arrivals[begin:])
        done = np.array(record.done[begin:])
        replicas = len(simulated.busy_seconds)
        return cls(
            routing,
            replicas,
            Latency.of(np.array(record.first[begin:]) - arrivals + overhead),
            Latency.of(done - arrivals + overhead),
            _hit_rates(record.tiers[begin:]),
            sum(traffic.outputs) / max(record.done),
            sum(simulated.busy_seconds) / replicas / max(record.done),
            simulated.queued > capacity,
        )

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)


def _hit_rates(tiers: Sequence[Tier]) -> HitRates:
    counts = np.bincount(tiers, minlength=4)[1:]
    shares = (counts / max(1, counts.sum())).tolist()
    return HitRates(*shares)


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a quantile: `ttft_p95=0.5` is half a second to the first token, for 95 of 100 requests."""

    measure: str
    quantile: str
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Return what a flag's value means. Raises UsageError."""
        match = re.fullmatch(r"(ttft|e2e)_(p50|p95|p99)=(\d{1,6}(?:\.\d{1,9})?)", text, re.ASCII)
        if not match or float(match[3]) == 0:
            raise UsageError(
                f"--goal {text!r} is not a bound on a latency", hint="write ttft_p95=0.5, or e2e with p50, p95 or p99"
            )
        return cls(match[1], match[2], float(match[3]))

    def is_met(self, outcome: Outcome) -> bool:
        """Whether an outcome keeps to it."""
        latency = outcome.ttft if self.measure == "ttft" else outcome.e2e
        return float(getattr(latency, self.quantile)) <= self.seconds
