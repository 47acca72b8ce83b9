"""ModelRunner: computes one step on a device and gives logits. Owns the graphs that it runs and the KV cache.

Knows chunks, blocks and rows that use adapters; knows nothing of queues, sampling or texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import compress
from typing import Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import ModelFolderError
from ovms_lora.engine.block_tables import BlockCopy
from ovms_lora.engine.bound_graph import BoundGraph
from ovms_lora.engine.device import device_error
from ovms_lora.engine.graph_source import CompiledGraph
from ovms_lora.engine.memory import available_memory
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


class OpenVinoRunner:
    """A ModelRunner over one OpenVINO device. Holds the KV cache, which outlives a change of the graph.

    With a plain graph beside one with LoRA, steps in which no row uses an adapter run on the plain one. Of the others
    each chunk runs where its tiles stand with the fewest unused ones beside them; see `LoraTiles`.
    """

    copies_blocks = True  # the caches are host tensors

    def __init__(
        self, graph: CompiledGraph, options: EngineOptions, *, max_model_len: int, plain: CompiledGraph | None = None
    ) -> None:
        self.vocab_size = graph.vocab_size
        caches = _cache_ports(graph.request)
        self.block_size = _block_size(caches)
        wanted = -(-max_model_len // self.block_size) * options.max_num_seqs
        self.num_blocks = _count_blocks(caches, options.cache_size, wanted)
        self._cache = {port.any_name: _cache_tensor(port, self.num_blocks) for port in caches}
        # Rows of bytes, whatever type and layout the device has chosen for a block.
        self._blocks = [tensor.data.reshape(self.num_blocks, -1).view(np.uint8) for tensor in self._cache.values()]
        self._plain = BoundGraph(plain.request, self._cache) if plain else None
        self._bind(graph)

    def adopt(self, graph: CompiledGraph, *, keep_plain: bool) -> None:
        """Run on another graph of the same model from now on; between two steps.

        With `keep_plain` a plain graph that it has run on so far stays beside it.
        """
        if self._tiles is None:
            self._plain = self._graph if keep_plain else None
        self._bind(graph)

    def _bind(self, graph: CompiledGraph) -> None:
        self._tiles = tiles = graph.tiles
        self._graph = BoundGraph(graph.request, self._cache, tiles.resident if tiles else None)
        self._active = BoundGraph(tiles.active.request, self._cache, tiles.active) if tiles else None

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks; see ModelRunner."""
        for copy in copies:
            for blocks in self._blocks:
                blocks[copy.target] = blocks[copy.source]

    def run(self, chunks: Sequence[Chunk]) -> FloatArray:
        """Compute one step; see ModelRunner."""
        try:
            if not any(chunk.sequence.tiles is not None for chunk in chunks):
                return self._infer(self._plain or self._graph, chunks)
            return self._infer_adapted(chunks)
        except (RuntimeError, MemoryError) as error:
            raise device_error(error, "a step") from error

    def _infer_adapted(self, chunks: Sequence[Chunk]) -> FloatArray:
        assert self._tiles and self._active, "sequences have tiles in a graph with LoRA"
        on_active = self._tiles.divide(chunks)
        if on_active.all() or not on_active.any():
            return self._infer(self._active if on_active.all() else self._graph, chunks)
        rows = np.repeat(on_active, [chunk.num_sampled for chunk in chunks])
        logits = np.empty((len(rows), self.vocab_size), np.float32)
        logits[rows] = self._infer(self._active, list(compress(chunks, on_active)))
        logits[~rows] = self._infer(self._graph, list(compress(chunks, ~on_active)))
        return logits

    def _infer(self, graph: BoundGraph, chunks: Sequence[Chunk]) -> FloatArray:
        self._feed(graph, chunks)
        graph.set_rows(chunks)
        graph.request.start_async()
        graph.request.wait()
        logits: FloatArray = graph.request.get_output_tensor(0).data
        return logits.reshape(-1, self.vocab_size)

    def _feed(self, graph: BoundGraph, chunks: Sequence[Chunk]) -> None:
        counts = np.array([chunk.count for chunk in chunks], np.int32)
        sampled = np.array([chunk.num_sampled for chunk in chunks], np.int32)
        past = np.array([chunk.start for chunk in chunks], np.int32)
        begins = _running_sum(counts)
        tokens, blocks, table_lengths = array("q"), array("i"), []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            tokens.extend(chunk.token_ids)
            used = -(-end // self.block_size)
            blocks.extend(sequence.blocks[:used])
            table_lengths.append(used)
        graph.set("input_ids", np.frombuffer(tokens, np.int64), np.int64)
        graph.set("position_ids", _ranges(past, counts), np.int64)
        graph.set("past_lens", past, np.int32)
        graph.set("subsequence_begins", begins, np.int32)
        graph.set("block_indices", np.frombuffer(blocks, np.int32), np.int32)
        graph.set("block_indices_begins", _running_sum(np.array(table_lengths, np.int32)), np.int32)
        graph.set("max_context_len", (past + counts).max(), np.int32)
        graph.set("sampled", _ranges(begins[1:] - sampled, sampled), np.int64)


def _cache_ports(request: ov.InferRequest) -> list[ov.Output]:
    return [port for port in request.model_inputs if "_cache." in port.any_name]


def _cache_tensor(port: ov.Output, num_blocks: int) -> ov.Tensor:
    shape = [num_blocks, *(dim.get_length() for dim in list(port.partial_shape)[1:])]
    try:
        return ov.Tensor(port.element_type, ov.Shape(shape))
    except (RuntimeError, MemoryError) as error:
        message = f"no memory for a KV cache of {num_blocks} blocks"
        raise ModelFolderError(message, hint="set a smaller cache_size") from error


def _ranges(firsts: IntArray, counts: IntArray) -> npt.NDArray[np.int64]:
    """Return `count` numbers in a row from each first one, one range after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(firsts - ends + counts, counts)


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
