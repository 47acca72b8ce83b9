"""Drafters for tests, which know what comes next, or never do; and a device whose rows cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from ovms_lora.engine.drafts import Draft
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.step_cost import StepCost


class FreeRows(StepCost):
    """Every guess is worth its price."""

    def price(self, sequences: int, seconds_per_token: float = 0.0) -> float:
        return 0.0


class Oracle:
    """A Drafter that says what `guess` says; it remembers whom it was told to keep."""

    free = True
    seconds_per_token = 0.0

    def __init__(self, guess: Callable[[Sequence, int], list[int]]) -> None:
        self._guess = guess
        self.kept: set[Sequence] = set()

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        return {sequence: Draft(tuple(self._guess(sequence, count))) for sequence, count in wanted.items()}

    def keep(self, sequences: Collection[Sequence]) -> None:
        self.kept = set(sequences)
