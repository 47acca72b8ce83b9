"""Free memory is the machine's, or what its control group leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms_lora.engine.memory import available_memory

GIB = 1 << 30


def machine(
    root: Path, *, free: int = 8 * GIB, limit: str | None = None, used: str = "0", stat: str = "anon 5\n"
) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:  {free // 1024} kB\n")
    if limit is not None:
        group = root / "sys/fs/cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(stat)
    return root


@pytest.mark.parametrize(
    ("limit", "used", "available"),
    [
        (None, "0", 8 * GIB),
        ("max", "123", 8 * GIB),
        (str(4 * GIB), str(GIB), 3 * GIB),
        (str(64 * GIB), str(GIB), 8 * GIB),
        (str(GIB), str(2 * GIB), 0),
        ("unreadable", "0", 8 * GIB),
    ],
)
def test_the_smaller_limit_counts(tmp_path: Path, limit: str | None, used: str, available: int) -> None:
    assert available_memory(machine(tmp_path, limit=limit, used=used)) == available


def test_file_cache_that_the_kernel_gives_back_is_not_used_up(tmp_path: Path) -> None:
    stat = f"anon 5\nfile {3 * GIB}\ninactive_file {2 * GIB}\n"
    assert available_memory(machine(tmp_path, limit=str(4 * GIB), used=str(4 * GIB), stat=stat)) == 2 * GIB


@pytest.mark.parametrize(
    ("limit", "available"), [(str(4 * GIB), 2 * GIB), (str(9223372036854771712), 8 * GIB), (str(GIB), 0)]
)
def test_the_first_version_of_control_groups_counts_too(tmp_path: Path, limit: str, available: int) -> None:
    group = machine(tmp_path) / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {GIB}\n")
    assert available_memory(tmp_path) == available


def test_a_kernel_that_does_not_say_has_little(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    assert available_memory(tmp_path) == GIB


def test_this_machine_has_some() -> None:
    assert available_memory() > 0
