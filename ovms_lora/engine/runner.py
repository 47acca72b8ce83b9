"""ModelRunner: computes one step on a device and gives logits. Owns the compiled graph and the KV-cache tensors.

Knows chunks and blocks; knows nothing of queues, sampling or texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import EngineError, ModelFolderError
from ovms_lora.engine.memory import available_memory
from ovms_lora.engine.paged_graph import read_paged_model
from ovms_lora.engine.scheduler import Chunk

FloatArray = npt.NDArray[np.float32]

# Of the memory that is free at start; pages are touched only as blocks fill, and several models share one machine.
_CACHE_SHARE = 0.25
_GIB = 1 << 30


class ModelRunner(Protocol):
    """What the engine needs of a device."""

    vocab_size: int
    block_size: int
    num_blocks: int

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


class OpenVinoRunner:
    """A ModelRunner over one OpenVINO device."""

    def __init__(self, folder: Path, options: EngineOptions, *, max_model_len: int) -> None:
        core = ov.Core()
        model = read_paged_model(core, folder)
        try:
            compiled = core.compile_model(model, options.device, dict(options.plugin_config))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            hint = "check device and plugin_config"
            raise ModelFolderError(f"{folder} does not compile for {options.device}: {reason}", hint=hint) from error
        self._request = compiled.create_infer_request()
        self.vocab_size = compiled.output("logits").partial_shape[-1].get_length()
        self._caches = [port for port in self._request.model_inputs if "_cache." in port.any_name]
        self.block_size = _block_size(self._caches)
        wanted = -(-max_model_len // self.block_size) * options.max_num_seqs
        self.num_blocks = _count_blocks(self._caches, options.cache_size, wanted)
        self._set_caches()
        self._inputs = {name: _Input(self._request, name, dtype) for name, dtype in _INPUTS.items()}

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

    def _set_caches(self) -> None:
        for port in self._caches:
            shape = [self.num_blocks, *(dim.get_length() for dim in list(port.partial_shape)[1:])]
            try:
                tensor = ov.Tensor(port.element_type, ov.Shape(shape))
            except (RuntimeError, MemoryError) as error:
                hint = "set a smaller cache_size"
                raise ModelFolderError(f"no memory for a KV cache of {self.num_blocks} blocks", hint=hint) from error
            self._request.set_tensor(port.any_name, tensor)


def _running_sum(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
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
