"""Copies on the disk: whole or not there, bounded, and never removed under a reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovms_lora.adapters.disk_cache import CopyKey, DiskCache, NotKeptError, default_cache_folder
from ovms_lora.core.errors import ConfigError, UnavailableError


def key(alias: str, version: str = "1") -> CopyKey:
    return CopyKey("b", alias, version)


def fill(cache: DiskCache, of: CopyKey, size: int = 100_000, *, used: float | None = None) -> None:
    with cache.staged(size) as folder:
        (folder / "weights").write_bytes(os.urandom(size))
        cache.keep(folder, of)
    if used is not None:
        os.utime(cache.folder / "kept" / of.bucket / of.alias / of.version / "manifest.json", (used, used))


def kept(cache: DiskCache) -> set[str]:
    return set(cache.aliases("b"))


def on_disk(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.rglob("weights"))


def test_the_least_recently_used_copies_give_way_by_their_bytes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 400_000)
    for at, alias in enumerate(("one", "two", "three")):
        fill(cache, key(alias), 80_000, used=at + 1)
    with cache.held(key("one")):
        pass  # used just now
    fill(cache, key("large"), 250_000)
    assert kept(cache) == {"one", "large"}
    assert on_disk(cache) <= cache.nbytes <= 400_000
    fill(cache, key("two"), 30_000)
    assert kept(cache) == {"one", "large", "two"}
    assert DiskCache(tmp_path, 400_000).nbytes == pytest.approx(cache.nbytes, abs=1000)  # manifests


def test_a_copy_stays_while_it_is_read(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 150_000)
    fill(cache, key("read"))
    with cache.held(key("read")) as folder:
        with pytest.raises(UnavailableError, match="no room"):
            fill(DiskCache(tmp_path, 150_000), key("other"))
        assert (folder / "weights").stat().st_size == 100_000
    fill(cache, key("other"))
    assert kept(cache) == {"other"}
    with pytest.raises(NotKeptError), cache.held(key("read")):
        pass


def test_room_is_kept_for_copies_that_are_being_made(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 150_000)
    with cache.staged(100_000), pytest.raises(UnavailableError, match="no room"), cache.staged(100_000):
        pass
    with cache.staged(100_000):
        pass


def test_a_damaged_copy_is_no_copy(tmp_path: Path) -> None:
    fill(DiskCache(tmp_path, 1_000_000), key("sql"))
    path = tmp_path / "kept" / "b" / "sql" / "1" / "weights"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    cache = DiskCache(tmp_path, 1_000_000)  # as after a restart
    with pytest.raises(NotKeptError), cache.held(key("sql")):
        pass
    assert not cache.has(key("sql"))
    fill(cache, key("sql"))
    with cache.held(key("sql")) as folder:
        assert (folder / "weights").read_bytes() != content


def test_the_version_that_was_last_current_is_the_newest(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1_000_000)
    for version in ("1", "2"):
        fill(cache, key("sql", version))
    os.utime(tmp_path / "kept" / "b" / "sql" / "2" / "checked", (1, 1))
    assert cache.newest("b", "sql") == key("sql", "1")
    cache.mark_checked(key("sql", "2"))
    os.utime(tmp_path / "kept" / "b" / "sql" / "1" / "checked", (1, 1))
    assert cache.newest("b", "sql") == key("sql", "2")
    cache.drop("b", "sql")
    assert cache.newest("b", "sql") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from ovms_lora.adapters.disk_cache import CopyKey, DiskCache
with DiskCache(Path(sys.argv[1]), 150_000).staged(100_000) as folder:
    (folder / "weights").write_bytes(bytes(70_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_was_writing_is_no_copy_and_its_room_comes_back(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -9
    assert len(list((tmp_path / "staging").iterdir())) == 1
    cache = DiskCache(tmp_path, 150_000)
    assert (kept(cache), cache.nbytes) == (set(), 0)
    fill(cache, key("sql"))
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be kept in") as refused:
        DiskCache(tmp_path / "file" / "cache", 1)
    assert "adapter_cache_path" in (refused.value.hint or "")


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_folder() == Path("/caches/ovms-lora/adapters")
