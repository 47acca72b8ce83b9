"""Arrivals: when requests come, and which adapter each asks for. Pure numbers, told by a seed."""

from __future__ import annotations

import numpy as np


def poisson(rate: float, seconds: float, *, seed: int = 0) -> list[float]:
    """Return the moments of a Poisson process of `rate` per second, within `seconds`."""
    rng = np.random.default_rng(seed)
    moments: list[float] = []
    now = rng.exponential(1 / rate)
    while now < seconds:
        moments.append(float(now))
        now += rng.exponential(1 / rate)
    return moments


def zipf(count: int, choices: int, *, exponent: float = 1.0, seed: int = 0) -> list[int]:
    """Return `count` numbers of 0 … choices - 1; number k comes with a probability as 1 / (k + 1) ** exponent."""
    weights = 1 / np.arange(1, choices + 1) ** exponent
    found: list[int] = np.random.default_rng(seed).choice(choices, count, p=weights / weights.sum()).tolist()
    return found
