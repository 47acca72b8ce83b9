"""Part and Plan: one measurement of the suite, and how much of it is done.

A part gives rows: flat dictionaries of texts and numbers, of which result files, plots and the report are made.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.rounds import in_turn

T = TypeVar("T")

Row = dict[str, str | float]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: the short form, or the long one. `folder` is for files that are not kept.

    One comparison has so many `rounds`, as far as they fit into its seconds; serving lasts `serving_seconds` a rate.
    """

    folder: Path
    long: bool = False
    rounds: int = 5
    tokens: int = 16
    batches: tuple[int, ...] = (1, 8, 16)
    registered: tuple[int, ...] = (8, 32)
    serving_seconds: float = 4.0
    comparison_seconds: float = 5.0

    @classmethod
    def of(cls, folder: Path, *, long: bool, seconds: float | None = None) -> Plan:
        """Return the plan of the long form, or of the short one with so many seconds for each comparison."""
        if not long:
            return cls(folder) if seconds is None else cls(folder, comparison_seconds=seconds)
        return cls(folder, True, 7, 64, (1, 2, 4, 8, 16, 32, 64), (1, 8, 64, 512), 60.0, math.inf)

    def in_turn(self, cases: Mapping[str, Callable[[int], T]]) -> dict[str, list[T]]:
        """Compare cases, in as many rounds as this plan allows; see `rounds.in_turn`."""
        return in_turn(cases, self.rounds, seconds=self.comparison_seconds)


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement: the module bench.NAME, imported when it is run, and what it is about."""

    name: str
    says: str

    def measure(self, model: Path, plan: Plan) -> Sequence[Row]:
        """Measure the model in a folder."""
        rows: Sequence[Row] = importlib.import_module(f"bench.{self.name}").measure(model, plan)
        return rows
