"""How much memory this process may still take: the machine's, or its control group's when that is less."""

from __future__ import annotations

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Return bytes that can be allocated without swapping; `root` is where /proc and /sys are found."""
    limits = [_machine(root), _control_group(root)]
    return min(limit for limit in limits if limit is not None)


def _machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 30  # a kernel that does not say: assume a small machine


def _control_group(root: Path) -> int | None:
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text()) - _idle_file_pages(folder)
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None


def _idle_file_pages(folder: Path) -> int:
    """Return the bytes of file cache that count as used and that the kernel gives back when they are wanted."""
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
