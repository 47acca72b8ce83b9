"""LoraResidency: which adapters stand in the graph's rank rows, and whether a sequence can run with them now.

    rank rows   [ sql sql sql sql | tools tools tools … | free … ]      each adapter has as many as its largest rank
    held        a running sequence uses it: it stays
    idle        least recently used first: gives way when another needs its rows, unless it is pinned
    forgotten   no alias names it any more: it goes as soon as it is idle

Belongs to the engine thread. What is in host memory, and under which alias, is not known here: a request brings its
adapters along.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.core.request import AdapterUse, HostAdapter
from ovms_lora.engine.lora_states import RankRows
from ovms_lora.engine.sequence import Sequence


class RankStates(Protocol):
    """Where adapters are written; `LoraStates` on a device."""

    def write(self, rows: RankRows, adapter: Adapter) -> None:
        """Put an adapter into these rank rows."""


@dataclass(slots=True, eq=False)
class _Resident:
    adapter: Adapter
    rows: RankRows
    holders: int = 0


class LoraResidency:
    """At most `max_loras` adapters in `total_rank` rank rows; `states` is None as long as there are no rows."""

    def __init__(self, states: RankStates | None, *, total_rank: int, max_loras: int) -> None:
        self.total_rank = total_rank
        self.max_loras = max_loras
        self.loads = 0
        self._states = states
        self._pinned: frozenset[str] = frozenset()
        self._named: frozenset[str] | None = None  # None: all of them
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._free: list[int] = list(range(total_rank))
        self._held: dict[Sequence, tuple[AdapterUse, ...]] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the resident adapters, least recently used first."""
        return tuple(self._residents)

    @property
    def free_rank(self) -> int:
        """Rank rows that no adapter has."""
        return len(self._free)

    def pin(self, digests: Collection[str]) -> None:
        """Name the adapters that stay once they are resident."""
        self._pinned = frozenset(digests)

    def name(self, digests: Collection[str]) -> None:
        """Name the adapters that have an alias; others give up their rows once no sequence holds them."""
        self._named = frozenset(digests)

    def acquire(self, sequence: Sequence) -> bool:
        """Make the sequence's adapters resident and hold them; False when those in use leave no room."""
        uses = sequence.request.adapters
        if not uses:
            return True
        adapters = {use.digest: use.adapter for use in uses}
        if not self._make_room({d: a for d, a in adapters.items() if d not in self._residents}, keep=adapters):
            return False
        for digest, adapter in adapters.items():
            resident = self._residents.pop(digest, None) or self._bring_in(adapter)
            resident.holders += 1
            self._residents[digest] = resident
        self._held[sequence] = uses
        sequence.strengths = self._strengths(uses)
        return True

    def release(self, sequence: Sequence) -> None:
        """Let go of what `acquire` held for the sequence; base sequences hold nothing."""
        for digest in {use.digest for use in self._held.pop(sequence, ())}:
            self._residents[digest].holders -= 1
            self._drop(digest)
        sequence.strengths = None

    def sweep(self) -> None:
        """Give up the rows of idle adapters that have no alias any more."""
        for digest in list(self._residents):
            self._drop(digest)

    def move(self, states: RankStates, total_rank: int) -> None:
        """Go on in another graph's states, with `total_rank` ≥ the present one: all residents keep their rows."""
        assert total_rank >= self.total_rank, "rank rows in use cannot go away"
        self._free += range(self.total_rank, total_rank)
        self._states, self.total_rank = states, total_rank
        for resident in self._residents.values():
            states.write(resident.rows, resident.adapter)
        for sequence, uses in self._held.items():
            sequence.strengths = self._strengths(uses)

    def _drop(self, digest: str) -> None:
        if self._named is not None and digest not in self._named and not self._residents[digest].holders:
            self._evict(digest)

    def _make_room(self, missing: dict[str, HostAdapter], keep: dict[str, HostAdapter]) -> bool:
        """Evict idle adapters, oldest first, until the missing ones have room; change nothing when that fails.

        Pinned ones go only for what could else never run: it was asked for before they were pinned.
        """
        rank = sum(adapter.max_rank for adapter in missing.values()) - len(self._free)
        count = len(self._residents) + len(missing) - self.max_loras
        pinned = self._pinned if self._fit_beside_pinned(keep) else frozenset()
        victims = []
        for digest, resident in self._residents.items():
            if rank <= 0 and count <= 0:
                break
            if not resident.holders and digest not in keep and digest not in pinned:
                victims.append(digest)
                rank -= len(resident.rows)
                count -= 1
        if rank > 0 or count > 0:
            return False
        for digest in victims:
            self._evict(digest)
        return True

    def _fit_beside_pinned(self, adapters: dict[str, HostAdapter]) -> bool:
        kept = [r for digest, r in self._residents.items() if digest in self._pinned and digest not in adapters]
        rank = sum(adapter.max_rank for adapter in adapters.values()) + sum(len(r.rows) for r in kept)
        return len(adapters) + len(kept) <= self.max_loras and rank <= self.total_rank

    def _evict(self, digest: str) -> None:
        self._free = sorted([*self._free, *self._residents.pop(digest).rows.tolist()])

    def _bring_in(self, adapter: HostAdapter) -> _Resident:
        assert isinstance(adapter, Adapter), "requests of this model carry loaded adapters"
        assert self._states, "nothing fits into no rank rows"
        rows = np.array(self._free[: adapter.max_rank], np.intp)
        self._free = self._free[adapter.max_rank :]
        self._states.write(rows, adapter)
        self.loads += 1
        return _Resident(adapter, rows)

    def _strengths(self, uses: Iterable[AdapterUse]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        strengths = np.zeros(self.total_rank, np.float32)
        for use in uses:
            strengths[self._residents[use.digest].rows] += np.float32(use.alpha)
        return strengths
