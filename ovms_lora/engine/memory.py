"""How much memory this process may still take: the machine's, or its control group's when that is less."""

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
    limits = [_machine(root), *(_control_group(root, version) for version in (_V2, _V1))]
    return min(limit for limit in limits if limit is not None)


def _machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30  # a kernel that does not say: assume a small machine


def _control_group(root: Path, files: _Accounting) -> int | None:
    folder = root / files.folder
    try:
        limit = (folder / files.limit).read_text().strip()
        used = int((folder / files.used).read_text()) - _idle_file_pages(folder / "memory.stat", files.idle)
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None


def _idle_file_pages(statistics: Path, key: str) -> int:
    """Return the bytes of file cache that count as used and that the kernel gives back when they are wanted."""
    for line in statistics.read_text().splitlines():
        if line.startswith(f"{key} "):
            return int(line.split()[1])
    return 0
