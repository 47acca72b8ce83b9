"""Workload: what clients ask for, and the requests that are drawn from it.

Arrivals are a Poisson process: clients do not wait for each other. The same seed draws the same requests, for any
number of replicas and any routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.token_lengths import TokenLengths

BASE = -1
"""The adapter of a request that asks for the plain model."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of arrival: seconds, adapter (or BASE), tokens of prompt and answer; `ranks` by adapter."""

    arrivals: list[float]
    adapters: list[int]
    prompts: list[int]
    outputs: list[int]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """`rate` requests per second, `base_share` of them without an adapter."""

    rate: float
    popularity: Popularity
    prompts: TokenLengths
    outputs: TokenLengths
    base_share: float = 0.0

    def draw(self, requests: int, seed: int) -> Traffic:
        """Return so many requests."""
        times, adapters, bases, prompts, outputs = (
            np.random.default_rng([seed, field]) for field in range(5)
        )  # one stream each: a longer run begins like a shorter one
        shares = self.popularity.shares
        asked = adapters.choice(len(shares), requests, p=shares)
        asked[bases.random(requests) < self.base_share] = BASE
        return Traffic(
            np.cumsum(times.exponential(1 / self.rate, requests)).tolist(),
            asked.tolist(),
            self.prompts.draw(requests, prompts).tolist(),
            self.outputs.draw(requests, outputs).tolist(),
            self.popularity.ranks.tolist(),
        )
