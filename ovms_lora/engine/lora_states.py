"""LoraStates: the tiles of resident adapters in the LoRA state variables of one compiled graph.

Knows the layout and the tensors; which adapter gets which tiles is `residency`'s decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.adapters.adapter import Adapter, LoraPair
from ovms_lora.engine.lora_graph import EMPTY, LoraLayout, LoraSlotGroup
from ovms_lora.engine.lora_rows import TileSet

TileIndices = npt.NDArray[np.intp]


def host_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy type of a state type."""
    return np.dtype(np.float32) if dtype == "f32" else np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, slots=True)
class _Opened:
    """The tensors of one group as arrays: A [linears, S, in, width] and B [chunks, S, width, c], and whose is which.

    `linears` has the path, the place in A and the chunks in B of each.
    """

    names: tuple[str, str]
    tensors: tuple[ov.Tensor, ov.Tensor]
    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    linears: tuple[tuple[str, int, slice], ...]


class LoraStates:
    """The states of one infer request. Only the tiles that are written change."""

    def __init__(self, request: ov.InferRequest, layout: LoraLayout) -> None:
        self.layout = layout
        self.request = request
        self.held = TileSet(0)
        self._dtype = host_dtype(layout.form.dtype)
        self._states = {state.name: state for state in request.query_state()}
        # A device in the process's own memory gives its tensor, others a copy that has to be set again.
        self._copies = False
        self._opened: list[_Opened] = []  # what shares memory with the device, once it is wanted
        request.set_tensor(EMPTY, ov.Tensor(np.zeros((0, 1, 1), np.float32)))
        self.resize(0)

    @property
    def count(self) -> int:
        """The tiles."""
        return self.held.count

    @property
    def width(self) -> int:
        """The rank rows of a tile."""
        return self.layout.form.width

    def resize(self, count: int) -> None:
        """Have this many tiles: those that stay keep their content, new ones are zero."""
        self._opened = []
        for group in self.layout.groups:
            for name, parts, rows, columns in self._shapes(group):
                new = self._tensor([parts * count, rows, columns])
                if self.count:
                    # Not self.count of them, where memory was refused in an earlier call half-way.
                    old = self._view(self._states[name].state).reshape(parts, -1, rows, columns)
                    kept = min(old.shape[1], count)
                    self._view(new).reshape(parts, count, rows, columns)[:, :kept] = old[:, :kept]
                self._states[name].state = new
            self._set_owners(group, count)
        self._have(TileSet(count))

    def take(self, tiles: TileIndices, other: LoraStates) -> None:
        """Have copies of these tiles of another request of the same graph, and no others."""
        if len(tiles) == self.count:
            opened = zip(self._open(), other._open(), strict=True)
            self.held = TileSet(0)  # none, where the device fails half-way
            for mine, theirs in opened:
                _copy_tiles(theirs.a, tiles, mine.a)
                _copy_tiles(theirs.b, tiles, mine.b)
                self._hand_in(mine)
            self.held = TileSet(len(tiles), tuple(tiles.tolist()))
        else:
            self._take_anew(tiles, other)

    def _take_anew(self, tiles: TileIndices, other: LoraStates) -> None:
        self._opened, self.held, count = [], TileSet(0), len(tiles)  # likewise
        for group, theirs in zip(self.layout.groups, other._open(), strict=True):
            for (name, parts, rows, columns), tensors in zip(self._shapes(group), (theirs.a, theirs.b), strict=True):
                new = self._unset([parts * count, rows, columns])
                _copy_tiles(tensors, tiles, self._view(new).reshape(parts, count, rows, columns))
                self._states[name].state = new
            self._set_owners(group, count)
        self._have(TileSet(count, tuple(tiles.tolist())))

    def _have(self, held: TileSet) -> None:
        self._copies = bool(held.count) and not self._shares_memory()
        self.held = held

    def _set_owners(self, group: LoraSlotGroup, count: int) -> None:
        owners = group.owner_input()
        if owners:
            # h stands by linear, then tile; each chunk takes the tiles of the linear that it belongs to.
            order = np.array(group.owners)[:, None] * count + np.arange(count)
            self.request.set_tensor(owners, ov.Tensor(order.astype(np.int32).reshape(-1)))

    def write(self, tiles: TileIndices, adapter: Adapter) -> None:
        """Put an adapter into these tiles, one for each `width` of its largest rank.

        Where the adapter has a smaller rank, or nothing, the tiles become zero: what stood there must not come back.
        """
        for group in self._open():
            pairs = [(adapter.layers.get(path), place, chunks) for path, place, chunks in group.linears]
            if any(pair is None or pair.rank < len(tiles) * self.width for pair, _, _ in pairs):
                for tile in tiles:
                    group.a[:, tile] = 0
                    group.b[:, tile] = 0
            for pair, place, chunks in pairs:
                if pair:
                    self._write_pair(group.a[place], group.b[chunks], tiles, pair)
            self._hand_in(group)

    def _hand_in(self, group: _Opened) -> None:
        if self._copies:
            for name, tensor in zip(group.names, group.tensors, strict=True):
                self._states[name].state = tensor

    def _write_pair(self, a: npt.NDArray[Any], b: npt.NDArray[Any], tiles: TileIndices, pair: LoraPair) -> None:
        """Write one linear: a [S, in, width], b [its chunks, S, width, c]."""
        for tile, begin in zip(tiles, range(0, pair.rank, self.width), strict=False):
            rank = min(pair.rank - begin, self.width)
            a[tile, :, :rank] = pair.a[begin : begin + rank].T
            rows = pair.b[:, begin : begin + rank].T.astype(np.float32, copy=False)
            chunks = rows.reshape(rank, len(b), -1).transpose(1, 0, 2)
            np.multiply(chunks, np.float32(pair.scaling), out=b[:, tile, :rank], casting="unsafe")

    def _open(self) -> list[_Opened]:
        # Asking the device for its tensors takes as long as writing an adapter of a small model.
        opened = self._opened or [self._open_group(group) for group in self.layout.groups]
        self._opened = [] if self._copies else opened
        return opened

    def _open_group(self, group: LoraSlotGroup) -> _Opened:
        (a_name, *a_shape), (b_name, *b_shape) = self._shapes(group)
        a, b = self._states[a_name].state, self._states[b_name].state
        ends = np.cumsum([group.owners.count(place) for place in range(len(group.paths))]).tolist()
        linears = tuple(
            (path, place, slice(begin, end))
            for place, (path, begin, end) in enumerate(zip(group.paths, [0, *ends], ends, strict=False))
        )
        return _Opened((a_name, b_name), (a, b), self._tiles(a, a_shape), self._tiles(b, b_shape), linears)

    def _shapes(self, group: LoraSlotGroup) -> list[tuple[str, int, int, int]]:
        """Return name, number of parts, and shape of one tile of A and B."""
        return [
            (group.a, len(group.paths), group.in_features, self.width),
            (group.b, len(group.owners), self.width, group.chunk_width),
        ]

    def _tiles(self, tensor: ov.Tensor, shape: list[int]) -> npt.NDArray[Any]:
        parts, rows, columns = shape
        if tensor.size != parts * self.count * rows * columns:
            raise RuntimeError("memory was refused to some of the states")
        return self._view(tensor).reshape(parts, self.count, rows, columns)

    def _tensor(self, shape: list[int]) -> ov.Tensor:
        tensor = self._unset(shape)
        self._view(tensor)[...] = 0
        return tensor

    def _unset(self, shape: list[int]) -> ov.Tensor:
        return ov.Tensor(ov.Type.f32 if self.layout.form.dtype == "f32" else ov.Type.bf16, ov.Shape(shape))

    def _shares_memory(self) -> bool:
        state = self._states[self.layout.groups[0].a]
        before = self._view(state.state)[0, 0, 0]
        self._view(state.state)[0, 0, 0] = before + 1
        shared = bool(self._view(state.state)[0, 0, 0] != before)
        self._view(state.state)[0, 0, 0] = before
        return shared

    def _view(self, tensor: ov.Tensor) -> npt.NDArray[Any]:
        # OpenVINO shows bf16 as some 16-bit numpy type; the bits are what counts.
        view: npt.NDArray[Any] = tensor.data.view(self._dtype)
        return view


def _copy_tiles(source: npt.NDArray[Any], tiles: TileIndices, target: npt.NDArray[Any]) -> None:
    """Copy tiles of [parts, S, rows, columns] to the places from 0 on."""
    for place, tile in enumerate(tiles):  # as one call of numpy it takes several times as long
        target[:, place] = source[:, tile]
