"""LoraStates: writes adapters into the LoRA state variables of a compiled graph, rank row by rank row.

Knows the layout and the tensors; which adapter gets which rank rows is `residency`'s decision.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.adapters.adapter import Adapter
from ovms_lora.engine.lora_graph import LoraLayout

RankRows = npt.NDArray[np.intp]


def host_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy type of a state type."""
    return np.dtype(np.float32) if dtype == "f32" else np.dtype(ml_dtypes.bfloat16)


class LoraStates:
    """The states of one infer request. Only the rank rows that are written change."""

    def __init__(self, request: ov.InferRequest, layout: LoraLayout) -> None:
        self.layout = layout
        self._dtype = host_dtype(layout.dtype)
        self._states = {state.name: state for state in request.query_state()}
        for group in layout.groups:
            self._zero(group.a, [group.in_features, len(group.b) * layout.total_rank])
            for name, width in zip(group.b, group.out_features, strict=True):
                self._zero(name, [layout.total_rank, width])
        # A device in the process's own memory gives its tensor, others a copy that has to be set again.
        self._copies = not self._shares_memory()

    def write(self, rows: RankRows, adapter: Adapter) -> None:
        """Put an adapter into these rank rows, as many as its largest rank.

        Where the adapter has a smaller rank, or nothing, the rows become zero: what stood there must not come back.
        """
        for group in self.layout.groups:
            self._write_down(group.a, group.paths, rows, adapter)
            for name, path in zip(group.b, group.paths, strict=True):
                self._write_up(name, path, rows, adapter)

    def _write_down(self, name: str, paths: tuple[str, ...], rows: RankRows, adapter: Adapter) -> None:
        tensor = self._states[name].state
        view = self._view(tensor)
        for index, path in enumerate(paths):
            columns = rows + index * self.layout.total_rank
            pair = adapter.layers.get(path)
            rank = pair.rank if pair else 0
            if pair:
                view[:, columns[:rank]] = pair.a.T
            view[:, columns[rank:]] = 0
        self._settle(name, tensor)

    def _write_up(self, name: str, path: str, rows: RankRows, adapter: Adapter) -> None:
        tensor = self._states[name].state
        view = self._view(tensor)
        pair = adapter.layers.get(path)
        rank = pair.rank if pair else 0
        if pair:
            view[rows[:rank]] = pair.b.T.astype(np.float32) * np.float32(pair.scaling)
        view[rows[rank:]] = 0
        self._settle(name, tensor)

    def _settle(self, name: str, tensor: ov.Tensor) -> None:
        if self._copies:
            self._states[name].state = tensor

    def _zero(self, name: str, shape: list[int]) -> None:
        tensor = ov.Tensor(ov.Type.f32 if self.layout.dtype == "f32" else ov.Type.bf16, ov.Shape(shape))
        self._view(tensor)[...] = 0
        self._states[name].state = tensor

    def _shares_memory(self) -> bool:
        state = self._states[self.layout.groups[0].a]
        self._view(state.state)[0, 0] = 1
        shared = bool(self._view(state.state)[0, 0] == 1)
        self._view(state.state)[0, 0] = 0
        return shared

    def _view(self, tensor: ov.Tensor) -> npt.NDArray[Any]:
        # OpenVINO shows bf16 as some 16-bit numpy type; the bits are what counts.
        view: npt.NDArray[Any] = tensor.data.view(self._dtype)
        return view
