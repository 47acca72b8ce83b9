"""TilePlan: which token rows of a step use which tiles, as the arrays that the graph takes.

Pure numpy; see `lora_graph` for what the arrays mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

# Up to this many rows of a tile are products of one row each, which need no packing of the tile; with more rows of a
# tile one product with all of them is faster. Measured on CPU at widths of 576 and 2048.
_SINGLE_ROWS = 3


@dataclass(frozen=True, slots=True, eq=False)
class SequenceTiles:
    """The tiles that all rows of one sequence use, at least one, and their strengths."""

    tiles: npt.NDArray[np.intp]
    alphas: FloatArray


@dataclass(frozen=True, slots=True)
class TileSet:
    """The tiles that a request's states hold: all `count` of them in their order, or copies of some, ascending."""

    count: int
    copies: tuple[int, ...] | None = None

    def places(self, tiles: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return where these tiles stand."""
        if self.copies is None:
            return tiles
        assert set(self.copies).issuperset(tiles.tolist()), "rows use tiles that are here"
        return np.searchsorted(self.copies, tiles)


@dataclass(frozen=True, slots=True)
class RowSpan:
    """`count` rows from `begin` that use the same tiles."""

    begin: int
    count: int
    use: SequenceTiles


@dataclass(frozen=True, slots=True, eq=False)
class TilePlan:
    """The arrays of one step; `position` of a row is where in [m1, S, m2] it stands, or one past the end."""

    tile_rows: IntArray
    alpha: FloatArray
    position: IntArray
    sum_rows: IntArray
    sum_alpha: FloatArray
    sum_position: IntArray

    def place(self, chunks: int) -> IntArray:
        """Return [T, chunks]: where each chunk of a row's part stands in d."""
        return self._in_d(self.position, chunks)

    def sum_place(self, chunks: int) -> IntArray:
        """Return [E, chunks], likewise for the further parts."""
        return self._in_d(self.sum_position, chunks)

    def _in_d(self, position: IntArray, chunks: int) -> IntArray:
        block = self.tile_rows.shape[1] * self.tile_rows.shape[2]
        outer, inner = np.divmod(position, max(block, 1))
        result = (outer * chunks * block + inner)[:, None] + np.arange(chunks, dtype=np.int32) * block
        result[position == self.tile_rows.size] = chunks * self.tile_rows.size
        places: IntArray = result.astype(np.int32, copy=False)
        return places


def plan_tiles(spans: Sequence[RowSpan], *, num_rows: int, held: TileSet, may_be_empty: bool) -> TilePlan:
    """Place the rows of the spans in the tiles that they use, which are among those held; the other rows use nothing.

    Without `may_be_empty` there are positions even when no row uses a tile; nothing reads what is computed there.
    """
    if not spans:
        rows = tiles = np.zeros(0, np.intp)
        alphas, first = np.zeros(0, np.float32), np.zeros(0, bool)
    else:
        rows = np.concatenate([np.repeat(np.arange(s.begin, s.begin + s.count), len(s.use.tiles)) for s in spans])
        tiles = held.places(np.concatenate([np.tile(span.use.tiles, span.count) for span in spans]))
        alphas = np.concatenate([np.tile(span.use.alphas, span.count) for span in spans])
        first = np.concatenate([np.tile(np.arange(len(s.use.tiles)) == 0, s.count) for s in spans])
    num_tiles = held.count
    counts = np.bincount(tiles, minlength=num_tiles)
    most = max(int(counts.max(initial=0)), 0 if may_be_empty else 1)
    order = np.argsort(tiles, kind="stable")
    turn = np.empty(len(tiles), np.int64)
    turn[order] = np.arange(len(tiles)) - (np.cumsum(counts) - counts)[tiles[order]]
    single = most <= _SINGLE_ROWS
    where = turn * num_tiles + tiles if single else tiles * most + turn
    tile_rows = np.zeros(most * num_tiles, np.int32)
    tile_rows[where] = rows
    position, alpha = np.full(num_rows, most * num_tiles, np.int32), np.zeros(num_rows, np.float32)
    position[rows[first]], alpha[rows[first]] = where[first], alphas[first]
    return TilePlan(
        tile_rows.reshape((most, num_tiles, 1) if single else (1, num_tiles, most)),
        alpha.reshape(-1, 1, 1),
        position,
        rows[~first].astype(np.int32).reshape(-1, 1),
        alphas[~first].reshape(-1, 1, 1),
        where[~first].astype(np.int32),
    )
