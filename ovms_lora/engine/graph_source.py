"""GraphSource: compiles a model folder's IR, plain or with a LoRA part.

Knows the folder, the device and what is to be in the graph; runs nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovms_lora.adapters.adapter import BaseLinears, LinearShape
from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError, NoMemoryError
from ovms_lora.engine.device import device_error, openvino_core
from ovms_lora.engine.kept_graph import KeptGraph
from ovms_lora.engine.linears import LinearGroup, find_linears, group_linears
from ovms_lora.engine.lora_graph import LoraForm, insert_lora
from ovms_lora.engine.lora_states import LoraStates
from ovms_lora.engine.lora_tiles import LoraTiles
from ovms_lora.engine.memory import available_memory
from ovms_lora.engine.paged_graph import find_ir, head_of, read_paged_model

_PLAIN_SHARE = 1 / 8  # of the memory that is free: up to there weights may be held twice


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """What a graph with LoRA is compiled for: the linears, and the form of the LoRA part.

    `width` is that of a tile in rank rows, `dtype` that of the states, and `sums` says whether a row may use several
    tiles.
    """

    paths: frozenset[str]
    width: int
    dtype: str
    sums: bool


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGraph:
    """One compiled graph; `tiles` is None for a plain one."""

    request: ov.InferRequest
    tiles: LoraTiles | None
    vocab_size: int


class GraphSource:
    """A model folder's IR, read once for its shape and compiled as often as another LoRA part is wanted."""

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        """Name what is to be compiled. Raises ModelFolderError when there is no IR."""
        self._core = openvino_core()
        self._folder, self._options = folder, options
        self._properties = dict(options.plugin_config)
        # OpenVINO's own way to keep compiled models fails with paged attention on this device.
        cache = self._properties.pop("CACHE_DIR", None) if options.device == "CPU" else None
        self._kept = self._kept_in(Path(str(cache))) if cache else None
        self._reading = threading.Lock()
        self._read: deque[ov.Model] = deque()  # one for the first graph; the next ones read it anew
        self._linears: BaseLinears | None = None

    @property
    def linears(self) -> BaseLinears:
        """The linears that adapters may target. Reads the IR when first asked; raises ModelFolderError."""
        with self._reading:
            if self._linears is None:
                model = read_paged_model(self._core, self._folder)
                linears = find_linears(model)
                head = head_of(model).get_friendly_name()
                path = next((linear.path for linear in linears if linear.node.get_friendly_name() == head), None)
                shapes = {linear.path: LinearShape(linear.out_features, linear.in_features) for linear in linears}
                self._linears = BaseLinears(shapes, path)
                self._read.append(model)
            return self._linears

    @property
    def inference_dtype(self) -> str:
        """The precision that the device infers in, as a state type: "bf16" or "f32"."""
        hint = self._options.plugin_config.get("INFERENCE_PRECISION_HINT")
        if hint is None:
            hint = self._core.get_property(self._options.device, "INFERENCE_PRECISION_HINT").to_string()
        return "bf16" if "bf" in str(hint) else "f32"

    @cached_property
    def affords_plain(self) -> bool:
        """Whether a plain graph is to stand beside one with LoRA, for steps in which nobody uses an adapter.

        It saves the walk over idle nodes, and takes the memory of the weights once more.
        """
        weights = find_ir(self._folder).with_suffix(".bin").stat().st_size
        return weights <= _PLAIN_SHARE * available_memory()

    def _kept_in(self, cache: Path) -> KeptGraph:
        try:
            return KeptGraph.of(self._core, find_ir(self._folder), self._properties, cache)
        except OSError as error:
            raise ModelFolderError(f"cannot read {self._folder}: {error}", hint="export the model again") from error

    def prepare(self) -> Callable[[], CompiledGraph]:
        """Do what a graph without adapters takes of the interpreter; return what compiles it, as `compile` does.

        Raises ModelFolderError.
        """
        if self._kept and self._kept.is_there:
            return self._compile_kept
        model, _ = self._grouped()
        return partial(self._compile_plain, model)

    def compile(self, lora: LoraTargets | None = None) -> CompiledGraph:
        """Compile the graph; takes seconds, from any thread. Raises ModelFolderError when the device refuses it."""
        if lora is None or not lora.paths:
            return self.prepare()()
        model, groups = self._grouped()
        form = LoraForm(lora.width, lora.dtype, sums=lora.sums, zero_row=self._needs_zero_row)
        layout = insert_lora(model, groups, lora.paths, form, head=self.linears.output_head or "")
        model.validate_nodes_and_infer_types()
        compiled = self._on_device(lambda: self._compiled(model))
        resident, active = (LoraStates(compiled.create_infer_request(), layout) for _ in range(2))
        weights = sum(shape.out_features * shape.in_features for shape in self.linears.shapes.values())
        tiles = LoraTiles(resident, active, model_size=weights / layout.tile_weights)
        return CompiledGraph(resident.request, tiles, _vocab_size(compiled))

    def _compile_kept(self) -> CompiledGraph:
        compiled = self._kept.load() if self._kept else None
        return _plain(compiled) if compiled else self.compile()

    def _compile_plain(self, model: ov.Model) -> CompiledGraph:
        # What is kept is held twice while it is written.
        kept = self._kept if self.affords_plain else None
        return _plain(self._on_device(lambda: kept.compile(model) if kept else self._compiled(model)))

    def _grouped(self) -> tuple[ov.Model, list[LinearGroup]]:
        try:
            model = self._read.pop()
        except IndexError:
            model = read_paged_model(self._core, self._folder)
        groups = group_linears(find_linears(model))
        model.validate_nodes_and_infer_types()
        return model, groups

    def _compiled(self, model: ov.Model) -> ov.CompiledModel:
        return self._core.compile_model(model, self._options.device, self._properties)

    def _on_device(self, compile_graph: Callable[[], ov.CompiledModel]) -> ov.CompiledModel:
        try:
            return compile_graph()
        except (RuntimeError, MemoryError) as error:
            failure = device_error(error, "a graph")
            if isinstance(failure, NoMemoryError):
                raise failure from error
            reason = str(error).strip().splitlines()[-1]
            message = f"{self._folder} does not compile for {self._options.device}: {reason}"
            raise ModelFolderError(message, hint="check device and plugin_config") from error

    @cached_property
    def _needs_zero_row(self) -> bool:
        """Whether a graph with LoRA runs steps without adapters, or Gather gives no zeros for an index past the end."""
        if not self.affords_plain:
            return True
        data, index = ops.parameter([-1, 64], np.float32), ops.parameter([-1], np.int32)
        model = ov.Model([ops.result(ops.gather(data, index, ops.constant(np.int64(0))))], [data, index])
        request = self._on_device(lambda: self._compiled(model)).create_infer_request()
        found = request.infer([np.ones((2, 64), np.float32), np.array([2, 7], np.int32)])
        return bool(np.any(found[0]))


def _plain(compiled: ov.CompiledModel) -> CompiledGraph:
    return CompiledGraph(compiled.create_infer_request(), None, _vocab_size(compiled))


def _vocab_size(compiled: ov.CompiledModel) -> int:
    size: int = compiled.output("logits").partial_shape[-1].get_length()
    return size
