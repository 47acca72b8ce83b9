"""The safetensors container: where each tensor lies in a file, checked before a byte of it is read.

    [u64 length of header][header: JSON {name: {dtype, shape, data_offsets}}][data]

Owns the container's rules: bounded header, known dtypes, at most two dimensions, data that is covered exactly: no
hole, no overlap, nothing behind. Only the dtypes of LoRA weights are taken. Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ovms_lora.adapters.adapter_folder import AdapterFile
from ovms_lora.adapters.quoting import quoted
from ovms_lora.adapters.strict_json import parse_object
from ovms_lora.core.errors import AdapterError, AdapterErrorCode

WEIGHTS_NAME = "adapter_model.safetensors"
# Names that PyTorch's pickles go by.
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

# A model of 126 layers has 1,764 tensors, at 160 bytes each. The JSON of more than these takes longer than 100 ms.
_LARGEST_HEADER = 2 << 20
_MOST_TENSORS = 8192
_LENGTH_BYTES = 8
_LARGEST_DIMENSION = (1 << 31) - 1
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# A header may be as long as one of these says when it is read as a number; then it begins with a brace.
_OTHER_FORMATS = (
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a zip archive (a PyTorch pickle)"),
    (re.compile(rb"\x80[\x00-\x05]"), "a Python pickle"),
    (re.compile(rb"GGUF"), "a GGUF file"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `offset` counts from the beginning of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file whose header has been checked; `tensors` are in the order of their data, `header` is its raw bytes."""

    file: AdapterFile
    header: bytes
    tensors: tuple[TensorInfo, ...]

    def read(self, info: TensorInfo) -> npt.NDArray[Any]:
        """Read one tensor. Raises AdapterError(TRUNCATED) where the file has become shorter."""
        array = np.empty(info.shape, info.dtype)
        # A view of bytes: numpy gives no buffer of bfloat16.
        self.file.read_into(array.reshape(-1).view(np.uint8).data, info.offset)
        return array


def open_safetensors(file: AdapterFile) -> SafetensorsFile:
    """Read and check the header.

    Raises AdapterError: FORMAT (another format by its first bytes), TRUNCATED, HEADER, DTYPE, SHAPE.
    """
    first = file.read(0, min(file.size, _LENGTH_BYTES + 1))
    if first[_LENGTH_BYTES:] != b"{":
        _refuse_other_formats(file.name, first)
    if file.size < _LENGTH_BYTES:
        raise AdapterError(AdapterErrorCode.TRUNCATED, f"{file.name} has {file.size} bytes, fewer than any header")
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if length > _LARGEST_HEADER:
        raise _header(f"the header of {file.name} claims {length} bytes, more than {_LARGEST_HEADER}")
    if length > file.size - _LENGTH_BYTES:
        raise AdapterError(AdapterErrorCode.TRUNCATED, f"{file.name} ends inside of its header")
    header = file.read(_LENGTH_BYTES, length)
    if not header.startswith(b"{"):
        raise _header(f"the header of {file.name} is no JSON object")
    entries = parse_object(
        header,
        what=f"the header of {file.name}",
        code=AdapterErrorCode.HEADER,
        max_containers=3 * _MOST_TENSORS,
        max_values=6 * _MOST_TENSORS,
        max_depth=4,
    )
    start = _LENGTH_BYTES + length
    _check_metadata(entries.pop("__metadata__", {}))
    tensors = sorted((_tensor(name, entry, start) for name, entry in entries.items()), key=_place)
    _check_covered(tensors, start, file)
    return SafetensorsFile(file, header, tuple(tensors))


def _place(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def _refuse_other_formats(name: str, first: bytes) -> None:
    for magic, what in _OTHER_FORMATS:
        if magic.match(first):
            raise AdapterError(
                AdapterErrorCode.FORMAT, f"{name} is {what}", hint="save the adapter with safe_serialization=True"
            )


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _header(f"tensor {quoted(name)} does not have exactly dtype, shape and data_offsets")
    dtype = _dtype(name, entry["dtype"])
    shape = _integers(name, "shape", entry["shape"])
    begin_end = _integers(name, "data_offsets", entry["data_offsets"])
    if len(begin_end) != 2 or begin_end[0] > begin_end[1]:
        raise _header(f"tensor {quoted(name)} has data_offsets that are no range")
    if len(shape) > 2 or any(dimension > _LARGEST_DIMENSION for dimension in shape):
        raise AdapterError(
            AdapterErrorCode.SHAPE, f"tensor {quoted(name)} has the shape of no LoRA weight: {quoted(str(shape))}"
        )
    nbytes = begin_end[1] - begin_end[0]
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise _header(f"tensor {quoted(name)} claims {nbytes} bytes, which is not what its shape and dtype take")
    return TensorInfo(name, dtype, shape, start + begin_end[0], nbytes)


def _dtype(name: str, value: Any) -> np.dtype[Any]:
    if not isinstance(value, str):
        raise _header(f"tensor {quoted(name)} has a dtype that is no string")
    if value not in _DTYPES:
        raise AdapterError(
            AdapterErrorCode.DTYPE,
            f"tensor {quoted(name)} has dtype {quoted(value)}",
            hint=f"LoRA weights are {', '.join(_DTYPES)}",
        )
    return _DTYPES[value]


def _integers(name: str, key: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise _header(f"tensor {quoted(name)} has a {key} that is no list of non-negative integers")
    return tuple(value)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _header("__metadata__ holds something else than strings")


def _check_covered(tensors: list[TensorInfo], start: int, file: AdapterFile) -> None:
    """The data area is the tensors one after another: Raises HEADER, or TRUNCATED where only the end is missing."""
    end = start
    for info in tensors:
        if info.offset != end:
            raise _header(f"tensor {quoted(info.name)} leaves a hole before it, or overlaps another")
        end += info.nbytes
    if end > file.size:
        raise AdapterError(AdapterErrorCode.TRUNCATED, f"{file.name} has {file.size} bytes of {end}")
    if end < file.size:
        raise _header(f"{file.name} has {file.size - end} bytes that belong to no tensor")


def _header(message: str) -> AdapterError:
    return AdapterError(AdapterErrorCode.HEADER, message)
