"""What an export takes of disk and memory, estimated from the source before the long work.

Owns: the estimates, and the refusal of an export that cannot fit.
Does not know: how the memory is used; the factors were measured (docs/decisions.md).
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ovms_lora.core.errors import ExportError
from ovms_lora.export.plan import Plan
from ovms_lora.export.source import SourceKind, tensor_shapes
from ovms_lora.export.weight_format import WeightFormat

# The peak of host memory over the weights as they are loaded; the largest is compression, and loading for a merge.
_MEMORY_FACTOR: Final = 1.5
_LIBRARIES: Final = 600 * 2**20
_SCALES: Final = 1.05  # scales and zero points of compressed weights, over the weights
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes: of the finished folder, of the repository's disk at the peak, and of host memory at the peak."""

    written: int
    disk: int
    memory: int


def estimate(plan: Plan) -> Needs:
    """Return what a planned export needs, about. Raises ExportError for a GGUF file that cannot be read."""
    if plan.source.kind is SourceKind.OPENVINO:
        return Needs(plan.source.size, plan.source.size, _LIBRARIES)
    weights, loaded_bits = _weights(plan), _loaded_bits(plan)
    written = int(weights * plan.weight_format.bits / 8 * (_SCALES if plan.weight_format.compressed else 1))
    loaded = weights * loaded_bits // 8
    disk = written
    if plan.weight_format.compressed:
        disk += loaded  # the IR before compression
    if plan.source.kind is SourceKind.GGUF:
        disk += weights * 4  # the Hugging Face folder made of it
    return Needs(written, disk, int(loaded * _MEMORY_FACTOR) + _LIBRARIES)


def check_resources(plan: Plan) -> None:
    """Raise ExportError if the disk or the memory has less room than the export takes at its peak."""
    needs, repository = estimate(plan), plan.request.repository
    free = shutil.disk_usage(repository).free
    if free < needs.disk:
        raise ExportError(
            f"the export needs about {gigabytes(needs.disk)} in {repository}, {gigabytes(free)} are free",
            hint="free some space, or choose another --model_repository_path",
        )
    available = available_memory()
    if available is not None and available < needs.memory:
        raise ExportError(
            f"the export needs about {gigabytes(needs.memory)} of memory, {gigabytes(available)} are available",
            hint="end other programs, or export on a machine with more memory and copy the folder",
        )


def gigabytes(size: int) -> str:
    """Return a size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def available_memory() -> int | None:
    """Return the bytes that this process may still take, by the system and by its cgroup; None where neither says."""
    limits = [_meminfo(), _cgroup_room()]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _cgroup_room() -> int | None:
    names = ("memory.max", "memory.current", "memory.stat")
    try:
        limit, used, statistics = ((_CGROUP / name).read_text(encoding="ascii").strip() for name in names)
    except OSError:
        return None
    if limit == "max":
        return None
    files = dict(line.split() for line in statistics.splitlines())["file"]  # cached, and given up when needed
    return max(0, int(limit) - int(used) + int(files))


def _weights(plan: Plan) -> int:
    """Return the number of weights of the source."""
    if plan.source.kind is SourceKind.GGUF:
        from ovms_lora.export.gguf import count_weights

        return count_weights(plan.source.path)
    return sum(math.prod(shape) for shape in tensor_shapes(plan.source.weight_files).values())


def _loaded_bits(plan: Plan) -> int:
    """Return in how many bits each weight is loaded; see `merge.choose_dtype`."""
    if plan.source.kind is SourceKind.GGUF or plan.adapters or plan.weight_format is WeightFormat.FP32:
        return 32
    from ovms_lora.export.merge import choose_dtype

    return int(choose_dtype(plan.source.path, plan.weight_format, merging=False).itemsize) * 8
