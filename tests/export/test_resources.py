"""What an export may take, by the system and by its cgroup, and what it is held to need."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovms_lora.export import resources
from ovms_lora.export.resources import available_memory, gigabytes

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 8 GiB available, and no cgroup yet."""
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    return tmp_path


def limit(machine: Path, maximum: str) -> None:
    (machine / "memory.max").write_text(f"{maximum}\n")
    (machine / "memory.current").write_text(f"{3 * GIB}\n")
    (machine / "memory.stat").write_text(f"anon {2 * GIB}\nfile {GIB}\nkernel 0\n")


def test_without_a_cgroup_the_system_says_it(machine: Path) -> None:
    assert available_memory() == 8 * GIB


@pytest.mark.parametrize(("maximum", "left"), [("max", 8), (str(4 * GIB), 2), (str(100 * GIB), 8), (str(GIB), 0)])
def test_the_tighter_limit_counts_and_cached_files_do_not(machine: Path, maximum: str, left: int) -> None:
    limit(machine, maximum)
    assert available_memory() == left * GIB


def test_where_nobody_says_it_nothing_is_refused(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert available_memory() is None


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MB"), (1_500_000, "1.5 MB"), (2_470_000_000, "2.5 GB")])
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert gigabytes(size) == text
