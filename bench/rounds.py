"""Rounds: every case has its turn in every round, and ratios are taken within one: machines change their speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def in_turn(
    cases: Mapping[str, Callable[[int], T]],
    rounds: int,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[T]]:
    """Run every case once to warm up and then `rounds` times, in turn; return what each run gave.

    A case gets the number of the round, 0 for the one that warms up. Each round begins with another case: the first
    ones of a round often run on a rested machine. There are fewer rounds, but one, where more would take longer than
    `seconds`.
    """
    begin = clock()
    for case in cases.values():
        case(0)
    found: dict[str, list[T]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(rounds):
        if number and (clock() - begin) * (number + 2) / (number + 1) > seconds:
            break
        first = number % len(order)
        for name in order[first:] + order[:first]:
            found[name].append(cases[name](number + 1))
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """A measure over rounds: its median, its extremes, the median of its ratios to the first case, and how many."""

    median: float
    low: float
    high: float
    ratio: float
    rounds: int

    def columns(self, name: str) -> dict[str, float]:
        """Return it as parts of a row: NAME, NAME_low, NAME_high, `of_first` and `rounds`."""
        extremes = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.median, **extremes, "of_first": self.ratio, "rounds": self.rounds}


def spreads(found: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Summarise rounds; each ratio is taken within its round."""
    first = next(iter(found.values()))
    return {
        name: Spread(
            statistics.median(values),
            min(values),
            max(values),
            statistics.median(value / base for value, base in zip(values, first, strict=True)),
            len(values),
        )
        for name, values in found.items()
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
