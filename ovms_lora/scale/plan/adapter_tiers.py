"""AdapterTiers: where one replica has its adapters, by the rules of the engine's residency and of the host store.

    resident   at most `max_loras` with ranks of `total_rank` together; least recently used out, unless held
    host       the `max_cpu_loras` most recently used; also whatever is resident or asked for
    disk       all others

Counts, and knows no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum


class Tier(IntEnum):
    """Where a request found its adapter: the dearest place it had to come from."""

    BASE = 0
    RESIDENT = 1
    HOST = 2
    DISK = 3


class AdapterTiers:
    """The tiers of one replica; `ranks` by adapter. `lost` is told of an adapter that nobody here has or wants."""

    __slots__ = ("_asked", "_free_rank", "_host", "_lost", "_max_cpu_loras", "_max_loras", "_ranks", "resident")

    def __init__(
        self,
        ranks: Sequence[int],
        lost: Callable[[int], None],
        *,
        max_loras: int,
        max_cpu_loras: int,
        total_rank: int,
    ) -> None:
        self._ranks = ranks
        self._lost = lost
        self._max_loras = max_loras
        self._max_cpu_loras = max_cpu_loras
        self._free_rank = total_rank
        self.resident: dict[int, int] = {}  # adapter → running sequences, least recently used first
        self._host: dict[int, None] = {}  # least recently used first
        self._asked: dict[int, int] = {}  # adapter → requests that have it in their hands

    def in_memory(self, adapter: int) -> bool:
        """Whether nothing has to be read from disk."""
        return adapter in self._host or adapter in self.resident or adapter in self._asked

    def ask(self, adapter: int) -> None:
        """Note a request of an adapter that is in memory now."""
        self._asked[adapter] = self._asked.get(adapter, 0) + 1
        self._host.pop(adapter, None)
        self._host[adapter] = None
        if len(self._host) > self._max_cpu_loras:
            del self._host[next(iter(self._host))]

    def acquire(self, adapter: int) -> bool | None:
        """Hold an adapter in the graph: True when it was there, False when it is brought in, None without room."""
        holders = self.resident.pop(adapter, None)
        if holders is not None:
            self.resident[adapter] = holders + 1
            return True
        if not self._make_room(self._ranks[adapter]):
            return None
        self._free_rank -= self._ranks[adapter]
        self.resident[adapter] = 1
        return False

    def release(self, adapter: int) -> None:
        """Let go of an adapter whose request has ended."""
        self.resident[adapter] -= 1
        if self._asked[adapter] == 1:
            del self._asked[adapter]
        else:
            self._asked[adapter] -= 1

    def _make_room(self, rank: int) -> bool:
        missing, count = rank - self._free_rank, len(self.resident) + 1 - self._max_loras
        victims = []
        for adapter, holders in self.resident.items():
            if missing <= 0 and count <= 0:
                break
            if not holders:
                victims.append(adapter)
                missing -= self._ranks[adapter]
                count -= 1
        if missing > 0 or count > 0:
            return False
        for adapter in victims:
            del self.resident[adapter]
            self._free_rank += self._ranks[adapter]
            if adapter not in self._asked:
                self._lost(adapter)
        return True
