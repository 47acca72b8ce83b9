"""ModelRunner: computes one step on a device and gives logits. Owns the compiled graph and the KV-cache tensors.

Knows chunks, blocks and rows that use adapters; knows nothing of queues, sampling or texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.adapters.adapter import BaseLinears, LinearShape
from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import EngineError, ModelFolderError
from ovms_lora.engine.block_tables import BlockCopy
from ovms_lora.engine.device import openvino_core
from ovms_lora.engine.linears import find_linears, group_linears
from ovms_lora.engine.lora_graph import ALPHA, HEAD_ALPHA, HEAD_ROWS, INITIAL, ROWS, insert_lora
from ovms_lora.engine.lora_states import LoraStates
from ovms_lora.engine.memory import available_memory
from ovms_lora.engine.paged_graph import head_of, read_paged_model
from ovms_lora.engine.scheduler import Chunk

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

# Of the memory that is free at start; pages are touched only as blocks fill, and several models share one machine.
_CACHE_SHARE = 0.25
_GIB = 1 << 30


class ModelRunner(Protocol):
    """What the engine needs of a device. `copies_blocks` tells whether `copy_blocks` may be called."""

    vocab_size: int
    block_size: int
    num_blocks: int
    copies_blocks: bool

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks of the KV cache, one after another."""

    def run(self, chunks: Sequence[Chunk]) -> FloatArray:
        """Compute the chunks; return logits [rows, vocab_size], each chunk's `num_sampled` rows in order.

        The array is valid until the next call. Raises EngineError when the device fails.
        """


class _Input:
    """One input of the infer request whose tensor is kept while its shape stays the same."""

    def __init__(self, request: ov.InferRequest, name: str, dtype: type[np.generic]) -> None:
        self._request, self._name, self._dtype = request, name, dtype
        self._array: npt.NDArray[Any] | None = None

    def set(self, values: npt.ArrayLike) -> None:
        new = np.asarray(values, dtype=self._dtype)
        if self._array is None or self._array.shape != new.shape:
            self._array = np.empty(new.shape, self._dtype)
            self._array[...] = new
            self._request.set_tensor(self._name, ov.Tensor(self._array, shared_memory=True))
        else:
            self._array[...] = new


_INPUTS: Mapping[str, type[np.generic]] = {
    "input_ids": np.int64,
    "position_ids": np.int64,
    "past_lens": np.int32,
    "subsequence_begins": np.int32,
    "block_indices": np.int32,
    "block_indices_begins": np.int32,
    "max_context_len": np.int32,
    "sampled": np.int64,
}


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """What a graph with LoRA is compiled for: the linears, the rank rows of all residents together, the state type."""

    paths: frozenset[str]
    total_rank: int
    dtype: str


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

    def compile(self, lora: LoraTargets | None = None) -> CompiledGraph:
        """Compile the graph; takes seconds, from any thread. Raises ModelFolderError when the device refuses it."""
        model = read_paged_model(self._core, self._folder)
        groups = group_linears(find_linears(model))
        layout = None
        if lora and lora.paths:
            layout = insert_lora(
                model, groups, lora.paths, total_rank=lora.total_rank, dtype=lora.dtype, head=self._head
            )
        model.validate_nodes_and_infer_types()
        device = self._options.device
        try:
            compiled = self._core.compile_model(model, device, dict(self._options.plugin_config))
        except RuntimeError as error:
            message = f"{self._folder} does not compile for {device}: {str(error).strip().splitlines()[-1]}"
            raise ModelFolderError(message, hint="check device and plugin_config") from error
        request = compiled.create_infer_request()
        vocab_size = compiled.output("logits").partial_shape[-1].get_length()
        if layout:
            request.set_tensor(INITIAL, ov.Tensor(np.zeros((), np.float32)))
        return CompiledGraph(request, LoraStates(request, layout) if layout else None, vocab_size)


class OpenVinoRunner:
    """A ModelRunner over one OpenVINO device. Holds the KV cache, which outlives a change of the graph."""

    copies_blocks = True  # the caches are host tensors

    def __init__(self, graph: CompiledGraph, options: EngineOptions, *, max_model_len: int) -> None:
        self.vocab_size = graph.vocab_size
        caches = _cache_ports(graph.request)
        self.block_size = _block_size(caches)
        wanted = -(-max_model_len // self.block_size) * options.max_num_seqs
        self.num_blocks = _count_blocks(caches, options.cache_size, wanted)
        self._cache = {port.any_name: _cache_tensor(port, self.num_blocks) for port in caches}
        # Rows of bytes, whatever type and layout the device has chosen for a block.
        self._blocks = [tensor.data.reshape(self.num_blocks, -1).view(np.uint8) for tensor in self._cache.values()]
        self.adopt(graph)

    def adopt(self, graph: CompiledGraph) -> None:
        """Run on another graph of the same model from now on; between two steps."""
        self._request = graph.request
        for name, tensor in self._cache.items():
            self._request.set_tensor(name, tensor)
        layout = graph.states.layout if graph.states else None
        self._layout = layout
        names = dict(_INPUTS)
        if layout and any(group.paths for group in layout.groups[: len(layout.groups) - layout.head]):
            names |= {ROWS: np.int32, ALPHA: np.float32}
        if layout and layout.head:
            names |= {HEAD_ROWS: np.int32, HEAD_ALPHA: np.float32}
        self._inputs = {name: _Input(self._request, name, dtype) for name, dtype in names.items()}

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks; see ModelRunner."""
        for copy in copies:
            for blocks in self._blocks:
                blocks[copy.target] = blocks[copy.source]

    def run(self, chunks: Sequence[Chunk]) -> FloatArray:
        """Compute one step; see ModelRunner."""
        self._feed(chunks)
        try:
            self._request.start_async()
            self._request.wait()
        except RuntimeError as error:
            raise EngineError(f"the device failed in a step: {str(error).strip().splitlines()[-1]}") from error
        logits: FloatArray = self._request.get_output_tensor(0).data
        return logits.reshape(-1, self.vocab_size)

    def _feed(self, chunks: Sequence[Chunk]) -> None:
        counts = np.array([chunk.count for chunk in chunks], np.int32)
        past = np.array([chunk.start for chunk in chunks], np.int32)
        begins = _running_sum(counts)
        tokens, blocks, table_lengths = array("q"), array("i"), []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            tokens.extend(sequence.token_ids[chunk.start : end])
            used = -(-end // self.block_size)
            blocks.extend(sequence.blocks[:used])
            table_lengths.append(used)
        sampled = [np.arange(end - chunk.num_sampled, end) for chunk, end in zip(chunks, begins[1:], strict=True)]
        inputs = self._inputs
        inputs["input_ids"].set(np.frombuffer(tokens, np.int64))
        inputs["position_ids"].set(np.arange(len(tokens)) + np.repeat(past - begins[:-1], counts))
        inputs["past_lens"].set(past)
        inputs["subsequence_begins"].set(begins)
        inputs["block_indices"].set(np.frombuffer(blocks, np.int32))
        inputs["block_indices_begins"].set(_running_sum(np.array(table_lengths, np.int32)))
        inputs["max_context_len"].set(np.max(past + counts))
        inputs["sampled"].set(np.concatenate(sampled))
        self._feed_lora(chunks, counts, ROWS, ALPHA)
        self._feed_lora(chunks, np.array([chunk.num_sampled for chunk in chunks], np.int32), HEAD_ROWS, HEAD_ALPHA)

    def _feed_lora(self, chunks: Sequence[Chunk], counts: IntArray, rows_name: str, alpha_name: str) -> None:
        """Say which of the rows (`counts` of them for each chunk) use adapters, and with what strengths."""
        if self._layout is None or rows_name not in self._inputs:
            return
        begins = _running_sum(counts)
        rows, strengths, repeats = [], [], []
        for index, chunk in enumerate(chunks):
            if chunk.sequence.strengths is not None and counts[index]:
                rows.append(np.arange(begins[index], begins[index + 1]))
                strengths.append(chunk.sequence.strengths)
                repeats.append(counts[index])
        if rows:
            self._inputs[rows_name].set(np.concatenate(rows))
            self._inputs[alpha_name].set(np.repeat(np.stack(strengths), repeats, axis=0))
        else:
            self._inputs[rows_name].set(np.zeros(0))
            self._inputs[alpha_name].set(np.zeros((0, self._layout.total_rank)))


def _cache_ports(request: ov.InferRequest) -> list[ov.Output]:
    return [port for port in request.model_inputs if "_cache." in port.any_name]


def _cache_tensor(port: ov.Output, num_blocks: int) -> ov.Tensor:
    shape = [num_blocks, *(dim.get_length() for dim in list(port.partial_shape)[1:])]
    try:
        return ov.Tensor(port.element_type, ov.Shape(shape))
    except (RuntimeError, MemoryError) as error:
        message = f"no memory for a KV cache of {num_blocks} blocks"
        raise ModelFolderError(message, hint="set a smaller cache_size") from error


def _running_sum(counts: IntArray) -> IntArray:
    result = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=result[1:])
    return result


def _block_size(caches: Sequence[ov.Output]) -> int:
    """The tokens of a block: the third dimension of [blocks, heads, block, head size]."""
    if not caches:
        raise ModelFolderError("the model has no KV cache", hint="export it with export_model.py text_generation")
    value = next(port for port in caches if port.any_name.startswith("value_cache."))
    size: int = value.partial_shape[2].get_length()
    return size


def _block_bytes(caches: Sequence[ov.Output]) -> int:
    total = 0
    for port in caches:
        elements = int(np.prod([dim.get_length() for dim in list(port.partial_shape)[1:]]))
        total += elements * port.element_type.bitwidth // 8
    return total


def _count_blocks(caches: Sequence[ov.Output], cache_gib: int, wanted: int) -> int:
    """How many blocks fit: into `cache_gib`, or when that is 0 into a share of free memory, at most `wanted` then."""
    size = _block_bytes(caches)
    if cache_gib:
        return max(cache_gib * _GIB // size, 1)
    fitting = int(available_memory() * _CACHE_SHARE) // size
    if fitting < 2:
        raise ModelFolderError("no memory is left for a KV cache", hint="free memory, or set cache_size")
    return min(fitting, wanted)
