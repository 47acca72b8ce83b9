"""Agenda: what happens next in a simulation. Things due at the same time happen in the order they were added."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[int, float], None]
"""Called with the argument it was added with, and the time."""


class Agenda:
    """Actions by time, in seconds."""

    __slots__ = ("_added", "_entries")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Action, int]] = []
        self._added = 0

    def add(self, time: float, action: Action, argument: int) -> None:
        """Have `action(argument, time)` called when it is time."""
        self._added += 1
        heapq.heappush(self._entries, (time, self._added, action, argument))

    @property
    def next_time(self) -> float:
        """When the next action is due; infinity when none is."""
        return self._entries[0][0] if self._entries else float("inf")

    def run_next(self) -> None:
        """Do what is due next."""
        time, _, action, argument = heapq.heappop(self._entries)
        action(argument, time)
