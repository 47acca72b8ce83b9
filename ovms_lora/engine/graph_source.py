"""GraphSource: compiles a model folder's IR, plain or with a LoRA part.

Knows the folder, the device and what is to be in the graph; runs nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovms_lora.adapters.adapter import BaseLinears, LinearShape
from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError, NoMemoryError
from ovms_lora.engine.device import device_error, openvino_core
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.lora_graph import LoraForm, insert_lora
from ovms_lora.engine.lora_states import LoraStates
from ovms_lora.engine.memory import available_memory
from ovms_lora.engine.paged_graph import IR_NAME, head_of, read_paged_model

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
    """One compiled graph; `states` is None for a plain one."""

    request: ov.InferRequest
    states: LoraStates | None
    vocab_size: int


class GraphSource:
    """A model folder's IR, read once for its shape and compiled as often as another LoRA part is wanted."""

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        """Read the IR. Raises ModelFolderError when it cannot be served."""
        self._core = openvino_core()
        self._folder, self._options = folder, options
        model = read_paged_model(self._core, folder)
        self._read = deque([model])  # for the first graph; the next ones read it anew
        linears = find_linears(model)
        head = head_of(model).get_friendly_name()
        self._head = next((linear.path for linear in linears if linear.node.get_friendly_name() == head), "")
        shapes = {linear.path: LinearShape(linear.out_features, linear.in_features) for linear in linears}
        self.linears = BaseLinears(shapes, self._head or None)

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
        weights = (self._folder / IR_NAME).with_suffix(".bin").stat().st_size
        return weights <= _PLAIN_SHARE * available_memory()

    def compile(self, lora: LoraTargets | None = None) -> CompiledGraph:
        """Compile the graph; takes seconds, from any thread. Raises ModelFolderError when the device refuses it."""
        try:
            model = self._read.pop()
        except IndexError:
            model = read_paged_model(self._core, self._folder)
        groups = group_linears(find_linears(model))
        layout = None
        if lora and lora.paths:
            form = LoraForm(lora.width, lora.dtype, sums=lora.sums, zero_row=self._needs_zero_row)
            layout = insert_lora(model, groups, lora.paths, form, head=self._head)
        model.validate_nodes_and_infer_types()
        compiled = self._compiled(model)
        request = compiled.create_infer_request()
        vocab_size = compiled.output("logits").partial_shape[-1].get_length()
        return CompiledGraph(request, LoraStates(request, layout) if layout else None, vocab_size)

    def _compiled(self, model: ov.Model) -> ov.CompiledModel:
        device = self._options.device
        try:
            return self._core.compile_model(model, device, dict(self._options.plugin_config))
        except (RuntimeError, MemoryError) as error:
            failure = device_error(error, "a graph")
            if isinstance(failure, NoMemoryError):
                raise failure from error
            message = f"{self._folder} does not compile for {device}: {str(error).strip().splitlines()[-1]}"
            raise ModelFolderError(message, hint="check device and plugin_config") from error

    @cached_property
    def _needs_zero_row(self) -> bool:
        """Whether a graph with LoRA runs steps without adapters, or Gather gives no zeros for an index past the end."""
        if not self.affords_plain:
            return True
        data, index = ops.parameter([-1, 64], np.float32), ops.parameter([-1], np.int32)
        model = ov.Model([ops.result(ops.gather(data, index, ops.constant(np.int64(0))))], [data, index])
        request = self._compiled(model).create_infer_request()
        found = request.infer([np.ones((2, 64), np.float32), np.array([2, 7], np.int32)])
        return bool(np.any(found[0]))
