"""LoraResidency: which adapters stand in the graph's tiles, and whether a sequence can run with them now.

    tiles       [ sql | tools | tools | free | mail … ]     each adapter has as many as its largest rank needs
    held        a running sequence uses it: it stays
    idle        least recently used first: gives way when another needs the room, unless it is pinned
    forgotten   no alias names it any more: it goes as soon as it is idle

Belongs to the engine thread. What is in host memory, and under which alias, is not known here: a request brings its
adapters along.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.core.request import AdapterUse, HostAdapter
from ovms_lora.engine.device import device_error
from ovms_lora.engine.lora_rows import SequenceTiles
from ovms_lora.engine.lora_states import TileIndices
from ovms_lora.engine.sequence import Sequence


class TileStates(Protocol):
    """Where adapters are written; `LoraTiles` on a device."""

    @property
    def count(self) -> int:
        """The tiles."""

    @property
    def width(self) -> int:
        """The rank rows of a tile."""

    def resize(self, count: int) -> None:
        """Have this many tiles."""

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        """Put an adapter into these tiles."""


@dataclass(slots=True, eq=False)
class _Resident:
    adapter: Adapter
    tiles: TileIndices
    holders: int = 0


class LoraResidency:
    """At most `max_loras` adapters with ranks of `total_rank` together; `states` is None as long as the graph has none.

    Ranks are counted as they are; that a tile is wider than some of them costs memory, not room.
    """

    def __init__(self, states: TileStates | None, *, total_rank: int, max_loras: int) -> None:
        self.total_rank = total_rank
        self.max_loras = max_loras
        self.brought_in = 0
        self._states = states
        self._pinned: frozenset[str] = frozenset()
        self._named: frozenset[str] | None = None  # None: all of them
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._free: list[int] = []  # tiles
        self._held: dict[Sequence, tuple[AdapterUse, ...]] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests of the resident adapters, least recently used first."""
        return tuple(self._residents)

    @property
    def free_rank(self) -> int:
        """The rank that no resident takes."""
        return self.total_rank - sum(resident.adapter.max_rank for resident in self._residents.values())

    def pin(self, digests: Collection[str]) -> None:
        """Name the adapters that stay once they are resident."""
        self._pinned = frozenset(digests)

    def name(self, digests: Collection[str]) -> None:
        """Name the adapters that have an alias; others give up their tiles once no sequence holds them."""
        self._named = frozenset(digests)

    def acquire(self, sequence: Sequence) -> bool:
        """Make the sequence's adapters resident and hold them; False when those in use leave no room.

        Raises EngineError where the device has no memory for them; then nothing is held.
        """
        uses = sequence.request.adapters
        if not uses:
            return True
        adapters = {use.digest: use.adapter for use in uses}
        if not self._make_room({d: a for d, a in adapters.items() if d not in self._residents}, keep=adapters):
            return False
        for digest, adapter in adapters.items():  # where memory is refused, none of them is held
            if digest not in self._residents:
                self._residents[digest] = self._bring_in(adapter)
        for digest in adapters:
            resident = self._residents[digest] = self._residents.pop(digest)
            resident.holders += 1
        self._held[sequence] = uses
        sequence.tiles = self._tiles(uses)
        return True

    def release(self, sequence: Sequence) -> None:
        """Let go of what `acquire` held for the sequence; base sequences hold nothing."""
        for digest in {use.digest for use in self._held.pop(sequence, ())}:
            self._residents[digest].holders -= 1
            self._drop(digest)
        sequence.tiles = None

    def sweep(self) -> None:
        """Give up the tiles of idle adapters that have no alias any more, and the memory of unused tiles at the end."""
        for digest in list(self._residents):
            self._drop(digest)
        if self._states:
            used = max((int(resident.tiles.max()) + 1 for resident in self._residents.values()), default=0)
            self._free = [tile for tile in self._free if tile < used]
            if used < self._states.count:
                self._states.resize(used)

    def move(self, states: TileStates) -> None:
        """Go on in another graph's states, which are empty: all residents are written into them.

        Raises what the device does; then all is as it was.
        """
        residents = list(self._residents.values())
        ends = np.cumsum([0, *(_count_tiles(resident.adapter, states) for resident in residents)])
        places = [np.arange(begin, end) for begin, end in itertools.pairwise(ends)]
        states.resize(int(ends[-1]))
        for resident, tiles in zip(residents, places, strict=True):
            states.write(tiles, resident.adapter)
        self._states, self._free = states, []
        for resident, tiles in zip(residents, places, strict=True):
            resident.tiles = tiles
        for sequence, uses in self._held.items():
            sequence.tiles = self._tiles(uses)

    def _drop(self, digest: str) -> None:
        if self._named is not None and digest not in self._named and not self._residents[digest].holders:
            self._evict(digest)

    def _make_room(self, missing: dict[str, HostAdapter], keep: dict[str, HostAdapter]) -> bool:
        """Evict idle adapters, oldest first, until the missing ones have room; change nothing when that fails.

        Pinned ones go only for what could else never run: it was asked for before they were pinned.
        """
        rank = sum(adapter.max_rank for adapter in missing.values()) - self.free_rank
        count = len(self._residents) + len(missing) - self.max_loras
        pinned = self._pinned if self._fit_beside_pinned(keep) else frozenset()
        victims = []
        for digest, resident in self._residents.items():
            if rank <= 0 and count <= 0:
                break
            if not resident.holders and digest not in keep and digest not in pinned:
                victims.append(digest)
                rank -= resident.adapter.max_rank
                count -= 1
        if rank > 0 or count > 0:
            return False
        for digest in victims:
            self._evict(digest)
        return True

    def _fit_beside_pinned(self, adapters: dict[str, HostAdapter]) -> bool:
        kept = [r for digest, r in self._residents.items() if digest in self._pinned and digest not in adapters]
        rank = sum(adapter.max_rank for adapter in adapters.values()) + sum(r.adapter.max_rank for r in kept)
        return len(adapters) + len(kept) <= self.max_loras and rank <= self.total_rank

    def _evict(self, digest: str) -> None:
        self._free = sorted([*self._free, *self._residents.pop(digest).tiles.tolist()])

    def _bring_in(self, adapter: HostAdapter) -> _Resident:
        assert isinstance(adapter, Adapter), "requests of this model carry loaded adapters"
        assert self._states, "nothing fits into a graph without states"
        count = _count_tiles(adapter, self._states)
        try:
            if count > len(self._free):
                self._free += self._grow(self._states, count - len(self._free))
            tiles = np.array(self._free[:count], np.intp)
            self._states.write(tiles, adapter)
        except (RuntimeError, MemoryError) as error:
            raise device_error(error, "the adapters of the request") from error
        self._free = self._free[count:]
        self.brought_in += 1
        return _Resident(adapter, tiles)

    def _grow(self, states: TileStates, count: int) -> range:
        """Make so many new tiles. Where memory is refused half-way, those that were made go again."""
        present = states.count
        try:
            states.resize(present + count)
        except (RuntimeError, MemoryError):
            states.resize(present)
            raise
        return range(present, present + count)

    def _tiles(self, uses: Iterable[AdapterUse]) -> SequenceTiles | None:
        strengths: dict[str, float] = {}
        for use in uses:
            strengths[use.digest] = strengths.get(use.digest, 0.0) + use.alpha
        tiles = [self._residents[digest].tiles for digest in strengths]
        alphas = np.repeat(np.array(list(strengths.values()), np.float32), [len(each) for each in tiles])
        return SequenceTiles(np.concatenate(tiles), alphas) if tiles else None


def _count_tiles(adapter: Adapter, states: TileStates) -> int:
    return -(-adapter.max_rank // states.width)
