"""BoundGraph: one infer request of a compiled graph with its input tensors, and the LoRA inputs among them.

Sets only what has changed; knows chunks and tiles, and nothing of how the values of other inputs come about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.engine.lora_graph import RowInputs
from ovms_lora.engine.lora_rows import RowSpan, TilePlan, TileSet, plan_tiles
from ovms_lora.engine.lora_states import LoraStates
from ovms_lora.engine.scheduler import Chunk


class _Input:
    """One input of the infer request whose tensor is kept while its shape stays the same."""

    def __init__(self, request: ov.InferRequest, name: str, dtype: type[np.generic]) -> None:
        self._request, self._name, self._dtype = request, name, dtype
        self._array: npt.NDArray[Any] | None = None

    def set(self, values: npt.ArrayLike) -> None:
        new = np.asarray(values, dtype=self._dtype)
        if self._array is None or self._array.shape != new.shape:
            array = np.array(new, self._dtype, order="C")
            self._request.set_tensor(self._name, ov.Tensor(array, shared_memory=True))
            self._array = array  # only now: where memory is refused, the next step sets it anew
        else:
            self._array[...] = new


class BoundGraph:
    """One infer request with its input tensors; `states` are its LoRA states, if the graph has any."""

    def __init__(
        self, request: ov.InferRequest, cache: Mapping[str, ov.Tensor], states: LoraStates | None = None
    ) -> None:
        self.request = request
        self._states = states
        for name, tensor in cache.items():
            self.request.set_tensor(name, tensor)
        self._inputs: dict[str, _Input] = {}
        layout = states.layout if states else None
        self._rows = _BoundRows(self.set, layout.rows) if layout and layout.rows else None
        self._head_rows = _BoundRows(self.set, layout.head_rows) if layout and layout.head_rows else None

    def set(self, name: str, values: npt.ArrayLike, dtype: type[np.generic]) -> None:
        """Set an input."""
        if name not in self._inputs:
            self._inputs[name] = _Input(self.request, name, dtype)
        self._inputs[name].set(values)

    def set_rows(self, chunks: Sequence[Chunk]) -> None:
        """Say which rows use which adapters, where the graph wants to know."""
        if self._states and self._rows:
            self._rows.set(chunks, [chunk.count for chunk in chunks], self._states.held)
        if self._states and self._head_rows:
            self._head_rows.set(chunks, [chunk.num_sampled for chunk in chunks], self._states.held)


class _BoundRows:
    """The inputs of one set of rows. While the same sequences decode nothing changes, and nothing is set."""

    def __init__(self, set_input: Callable[[str, npt.ArrayLike, type[np.generic]], None], names: RowInputs) -> None:
        self._set_input, self._names = set_input, names
        self._last: tuple[list[RowSpan], int, TileSet] | None = None

    def set(self, chunks: Sequence[Chunk], counts: Sequence[int], held: TileSet) -> None:
        """Set what `counts` rows of each chunk use."""
        spans, begin = [], 0
        for chunk, count in zip(chunks, counts, strict=True):
            if chunk.sequence.tiles is not None and count:
                spans.append(RowSpan(begin, count, chunk.sequence.tiles))
            begin += count
        now = (spans, begin, held)
        if now == self._last:
            return
        self._last = None  # until all of it is set: memory may be refused in between
        plan = plan_tiles(spans, num_rows=begin, held=held, may_be_empty=self._names.form.zero_row)
        assert self._names.form.sums or not len(plan.sum_rows), "a graph without sums takes rows with one tile"
        self._set_plan(plan)
        self._last = now

    def _set_plan(self, plan: TilePlan) -> None:
        names = self._names
        self._set_input(names.tile_rows, plan.tile_rows, np.int32)
        self._set_input(names.alpha, plan.alpha, np.float32)
        for chunks in names.chunks:
            self._set_input(names.place(chunks), plan.place(chunks), np.int32)
        if names.form.sums:
            self._set_input(names.sum_rows, plan.sum_rows, np.int32)
            self._set_input(names.sum_alpha, plan.sum_alpha, np.float32)
            for chunks in names.chunks:
                self._set_input(names.sum_place(chunks), plan.sum_place(chunks), np.int32)
