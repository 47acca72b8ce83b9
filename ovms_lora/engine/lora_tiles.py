"""LoraTiles: resident adapters in the states of one infer request, and those that steps use in those of a second one.

    resident   [ sql | tools | tools | mail | free … ]    all that may be used; any step can run on these
    active     [ tools | tools ]                          copies of the few that are in use

A product computes as many positions for each tile as the busiest one has rows, whether the others have any or not. So
adapters that nobody uses at the time cost as much as those in use, and a long prompt of one pays for all of them. The
second request of the same graph holds few tiles; a step runs on it as a whole, or its long chunks do. Copying takes
time, too: it waits until staying has cost as much more, and so never takes more than it might have saved (ski rental).

Belongs to the engine thread. Knows which tiles rows use, and nothing of aliases.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.engine.lora_states import LoraStates, TileIndices
from ovms_lora.engine.scheduler import Chunk

log = logging.getLogger(__name__)

# Costs are counted in rows of one tile. Measured on CPU with SmolLM2 and the 1B shape, tiles of 16 rank rows.
_READING = 8  # to read a tile takes as long as to compute so many rows; so does the model with rows of its own
_COPYING = 64  # for each tile; where their number changes, memory is taken anew, too
_TAKING = 128
_MOST_REGRETS = 256  # sets of tiles that are remembered

Mask = npt.NDArray[np.bool_]
_Rows = npt.NDArray[np.intp]  # of each resident tile


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Which chunks run on the active tiles, which tiles these need, and what the step costs with no others active."""

    on_active: Mask
    tiles: TileIndices
    cost: float


class LoraTiles:
    """Both sets of tiles. `model_size` is how many tiles have as many weights as the model's linears."""

    def __init__(self, resident: LoraStates, active: LoraStates, *, model_size: float) -> None:
        self.resident = resident
        self.active = active
        self._pass_cost = _READING * model_size
        self._copied: frozenset[int] = frozenset()
        # How much less steps would have cost with copies of these tiles, since they were copied last.
        self._regrets: dict[tuple[int, ...], float] = {}

    @property
    def count(self) -> int:
        """The resident tiles."""
        return self.resident.count

    @property
    def width(self) -> int:
        """The rank rows of a tile."""
        return self.resident.width

    def resize(self, count: int) -> None:
        """Have this many resident tiles; see `LoraStates`."""
        if count < self.count:
            self._forget()
        try:
            self.resident.resize(count)
        except (RuntimeError, MemoryError):
            if not self.active.count:
                raise
            self._forget()  # the room that copies take comes after that of the tiles
            self.resident.resize(count)

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        """Put an adapter into these resident tiles; see `LoraStates`."""
        self._copied -= set(tiles.tolist())
        self.resident.write(tiles, adapter)

    def divide(self, chunks: Sequence[Chunk]) -> Mask:
        """Return of each chunk of a step whether it runs on the active tiles; copies tiles when that pays.

        Raises what the device does.
        """
        all_resident = np.zeros(len(chunks), bool)
        if self.count == 1:
            return all_resident
        rows = self._rows(chunks)
        now = best = _Plan(all_resident, np.zeros(0, np.intp), self.count * _positions(rows))
        for on_active in self._divisions(chunks):
            whole = bool(on_active.all())
            own = rows if whole else self._rows(compress(chunks, on_active))
            tiles = np.flatnonzero(own)
            others = 0.0 if whole else self._pass_cost + self.count * _positions(rows - own)
            if self._copied.issuperset(tiles.tolist()):
                now = min(now, _Plan(on_active, tiles, self.active.count * _positions(own) + others), key=_cost)
            if 2 * len(tiles) <= self.count:
                best = min(best, _Plan(on_active, tiles, len(tiles) * _positions(own) + others), key=_cost)
        if best.cost < now.cost and self._pays(best.tiles, now.cost - best.cost):
            return best.on_active if self._copy(best.tiles) else all_resident
        return now.on_active

    def _pays(self, tiles: TileIndices, saved: float) -> bool:
        """Note what copies of these tiles would save in this step; return whether they have paid for themselves."""
        key = tuple(tiles.tolist())
        if len(self._regrets) >= _MOST_REGRETS:
            self._regrets.clear()
        regret = self._regrets[key] = self._regrets.get(key, 0.0) + saved
        price = _COPYING if len(tiles) == self.active.count else _COPYING + _TAKING
        if regret < price * len(tiles):
            return False
        del self._regrets[key]
        return True

    def _divisions(self, chunks: Sequence[Chunk]) -> Iterator[Mask]:
        """Name what may run on the active tiles: the step as a whole; its longest chunks, where others are shorter."""
        yield np.ones(len(chunks), bool)
        counts = np.array([chunk.count if chunk.sequence.tiles is not None else 0 for chunk in chunks])
        shortest = counts[counts > 0].min(initial=_READING)
        for length in np.unique(counts[counts > shortest]):
            yield counts >= length

    def _rows(self, chunks: Iterable[Chunk]) -> _Rows:
        rows = np.zeros(self.count, np.intp)
        for chunk in chunks:
            if chunk.sequence.tiles is not None:
                rows[chunk.sequence.tiles.tiles] += chunk.count
        return rows

    def _copy(self, tiles: TileIndices) -> bool:
        """Make these tiles the active ones; False where memory is refused. Then none is active."""
        try:
            self.active.take(tiles, self.resident)
        except (RuntimeError, MemoryError) as error:
            log.warning("%d tiles were not copied, steps run on all resident ones: %s", len(tiles), error)
            self._forget()
            return False
        self._copied = frozenset(tiles.tolist())
        return True

    def _forget(self) -> None:
        self._copied = frozenset()
        self.active.resize(0)


def _positions(rows: _Rows) -> int:
    """Return how many positions each tile has, or what takes as long."""
    return max(int(rows.max(initial=0)), _READING)


def _cost(plan: _Plan) -> float:
    return plan.cost
