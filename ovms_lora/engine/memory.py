"""How much memory this process may take, and still take: the machine's, or its control group's when that is less."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Accounting:
    """The files in which a control group says what it may take and has taken, below `folder`."""

    folder: str
    limit: str
    used: str
    idle: str


_V2 = _Accounting("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = _Accounting(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)  # without a limit it says a number near 2^63


def available_memory(root: Path = Path("/")) -> int:
    """Return bytes that can be allocated without swapping; `root` is where /proc and /sys are found."""
    left = (_left_in_group(root, files) for files in (_V2, _V1))
    return min([_machine(root, "MemAvailable"), *(size for size in left if size is not None)])


def total_memory(root: Path = Path("/")) -> int:
    """Return bytes that the process could have if nothing else ran; always the same on one machine."""
    limits = (_group_limit(root / files.folder, files) for files in (_V2, _V1))
    return min([_machine(root, "MemTotal"), *(limit for limit in limits if limit is not None)])


def _machine(root: Path, key: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 1 << 30  # a kernel that does not say: assume a small machine


def _left_in_group(root: Path, files: _Accounting) -> int | None:
    folder = root / files.folder
    limit = _group_limit(folder, files)
    try:
        used = int((folder / files.used).read_text()) - _idle_file_pages(folder / "memory.stat", files.idle)
    except (OSError, ValueError):
        return None
    return None if limit is None else max(limit - used, 0)


def _group_limit(folder: Path, files: _Accounting) -> int | None:
    try:
        limit = (folder / files.limit).read_text().strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def _idle_file_pages(statistics: Path, key: str) -> int:
    """Return the bytes of file cache that count as used and that the kernel gives back when they are wanted."""
    for line in statistics.read_text().splitlines():
        if line.startswith(f"{key} "):
            return int(line.split()[1])
    return 0
