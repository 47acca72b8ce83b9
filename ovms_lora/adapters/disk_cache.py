"""DiskCache: copies of adapters from buckets in a local folder, shared by the processes of a machine.

    <folder>/kept/<bucket>/<alias>/<version>/    whole copies, never written to again, with a manifest
    <folder>/staging/<bytes>-…/                  copies that are being made, and ones that are being removed
    <folder>/locks/                              one lock for each adapter that is fetched, one for making room

Owns: at most `max_bytes` in kept and staging together, least recently used out; no copy without its whole content; no
copy removed while it is read. A copy being written, removed or read is locked by descriptor, so the kernel lets go of
it whatever ends the process. Knows nothing of buckets and of what adapters hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ovms_lora.core.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_CHECKED = "checked"
_MANIFEST_BYTES = 4096
_SPARE_BYTES = 64 << 20
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotKeptError(Exception):
    """The cache has no such copy, or has just removed it."""


def default_cache_folder() -> Path:
    """Return where copies are kept unless something else is said. Raises ConfigError where nobody has a home."""
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep adapters in",
            hint="give a folder as lora_options.adapter_cache_path or --adapter-cache-path",
        ) from error
    return Path(caches) / "ovms-lora" / "adapters"


@dataclass(frozen=True, slots=True)
class CopyKey:
    """Which copy: of an adapter of a bucket, in one version. All three are names that a file may have."""

    bucket: str
    alias: str
    version: str


@dataclass(frozen=True, slots=True)
class _Copy:
    path: Path
    nbytes: int
    used: float


class DiskCache:
    """Copies of adapters in `folder`, together at most `max_bytes`. Safe from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._verified: set[CopyKey] = set()
        self._kept, self._staging, self._locks = (folder / name for name in ("kept", "staging", "locks"))
        try:
            for path in (folder, self._kept, self._staging, self._locks):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.nbytes = sum(copy.nbytes for copy in self._copies())
        except OSError as error:
            raise ConfigError(
                f"adapters cannot be kept in {folder}: {error.strerror}",
                hint="give another folder as lora_options.adapter_cache_path or --adapter-cache-path",
            ) from error

    def has(self, key: CopyKey) -> bool:
        """Whether there is a copy."""
        return (self._path(key) / _MANIFEST).is_file()

    def newest(self, bucket: str, alias: str) -> CopyKey | None:
        """Return the copy of an adapter that was last known to be what the bucket holds."""
        with contextlib.suppress(OSError):
            versions = [CopyKey(bucket, alias, entry.name) for entry in os.scandir(self._kept / bucket / alias)]
            return max(filter(self.has, versions), key=self.checked, default=None)
        return None

    def aliases(self, bucket: str) -> frozenset[str]:
        """Return the names of a bucket's adapters of which there are copies."""
        with contextlib.suppress(OSError):
            names = [entry.name for entry in os.scandir(self._kept / bucket)]
            return frozenset(name for name in names if self.newest(bucket, name))
        return frozenset()

    def checked(self, key: CopyKey) -> float:
        """Return when a copy was last known to be what the bucket holds, in seconds of the system's clock."""
        return _mtime(self._path(key) / _CHECKED)

    def mark_checked(self, key: CopyKey) -> None:
        """Note that a copy is what the bucket holds now."""
        with contextlib.suppress(OSError):
            (self._path(key) / _CHECKED).touch()

    @contextlib.contextmanager
    def held(self, key: CopyKey) -> Iterator[Path]:
        """Give the folder of a copy, which stays until the end. Raises NotKeptError."""
        path = self._path(key)
        with _locked(path, fcntl.LOCK_SH) as there:
            if not there:
                raise NotKeptError
            if key not in self._verified:
                self._verify(key, path)
            with contextlib.suppress(OSError):
                os.utime(path / _MANIFEST)
            yield path

    @contextlib.contextmanager
    def one_at_a_time(self, bucket: str, alias: str, *, seconds: float) -> Iterator[None]:
        """Keep other threads and processes from fetching the same adapter. Raises UnavailableError after `seconds`."""
        lock = FileLock(self._locks / f"{bucket}-{alias}.lock", timeout=seconds)
        try:
            with lock:
                yield
        except Timeout as error:
            raise UnavailableError(f"adapter '{alias}' is being fetched by another process for too long") from error

    @contextlib.contextmanager
    def staged(self, nbytes: int) -> Iterator[Path]:
        """Give an empty folder for a copy of `nbytes`, for which room was made; `keep` what is whole.

        Raises UnavailableError when there is no room.
        """
        nbytes += _MANIFEST_BYTES
        with contextlib.ExitStack() as stack:
            try:
                with FileLock(self._locks / "room"):
                    self._make_room(nbytes)
                    path = Path(tempfile.mkdtemp(prefix=f"{nbytes}-", dir=self._staging))
                    stack.callback(shutil.rmtree, path, ignore_errors=True)
                    stack.enter_context(_locked(path, fcntl.LOCK_EX))
            except OSError as error:
                raise UnavailableError(f"adapters cannot be kept on the disk: {error.strerror}") from error
            yield path

    def keep(self, path: Path, key: CopyKey) -> None:
        """Make a copy of what stands in a staged folder."""
        files = [{"name": file.name, "size": file.stat().st_size, "sha256": _sha256(file)} for file in path.iterdir()]
        (path / _MANIFEST).write_text(json.dumps({"files": files}), encoding="utf-8")
        (path / _CHECKED).touch()
        target = self._path(key)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.has(key):
            shutil.rmtree(target, ignore_errors=True)  # what is left of a damaged one
        # Not flushed to the disk: after a loss of power the digests tell.
        path.rename(target)
        self._verified.add(key)
        self.nbytes += sum(file["size"] for file in files if isinstance(file["size"], int))

    def drop(self, bucket: str, alias: str) -> None:
        """Remove all copies of an adapter that nobody reads."""
        with FileLock(self._locks / "room"):
            for copy in self._copies_in(self._kept / bucket / alias):
                self._remove(copy)

    def _make_room(self, nbytes: int) -> None:
        """Remove what is least recently used until there is room. For the holder of the lock."""
        total = nbytes + sum(map(self._staged_bytes, list(self._staging.iterdir())))
        copies = sorted(self._copies(), key=lambda copy: copy.used)
        total += sum(copy.nbytes for copy in copies)
        for copy in copies:
            if total <= self.max_bytes and self._disk_has(nbytes):
                break
            if self._remove(copy):
                total -= copy.nbytes
        self.nbytes = max(0, total - nbytes)
        if total > self.max_bytes or not self._disk_has(nbytes):
            raise UnavailableError(
                "there is no room for this adapter in the adapter cache now; try again later",
                hint="give it more room with adapter_cache_size, or another disk with adapter_cache_path",
            )

    def _disk_has(self, nbytes: int) -> bool:
        return shutil.disk_usage(self.folder).free >= nbytes + _SPARE_BYTES

    def _staged_bytes(self, path: Path) -> int:
        """Return the bytes for which a staged folder has room; one that a dead process left is removed."""
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as dead:
            if dead:
                shutil.rmtree(path, ignore_errors=True)
                return 0
        size, _, _ = path.name.partition("-")
        return int(size) if size.isdecimal() else 0

    def _copies(self) -> Iterator[_Copy]:
        for adapter in list(self._kept.glob("*/*")):
            yield from self._copies_in(adapter)

    def _copies_in(self, adapter: Path) -> list[_Copy]:
        with contextlib.suppress(OSError):
            return [_Copy(path, _bytes_in(path), _mtime(path / _MANIFEST)) for path in adapter.iterdir()]
        return []

    def _remove(self, copy: _Copy) -> bool:
        """Remove a copy; return False, and leave it, while somebody reads it."""
        with _locked(copy.path, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            if not free:
                return False
            # First out of sight: what is half removed is no copy.
            grave = Path(tempfile.mkdtemp(prefix="0-", dir=self._staging)) / "copy"
            copy.path.rename(grave)
            shutil.rmtree(grave.parent, ignore_errors=True)
            with contextlib.suppress(OSError):
                copy.path.parent.rmdir()
        self.nbytes = max(0, self.nbytes - copy.nbytes)
        return True

    def _verify(self, key: CopyKey, path: Path) -> None:
        """Raise NotKeptError, and remove the copy, unless its content is what was stored."""
        if not _is_whole(path):
            log.warning("the copy of adapter %s in %s is damaged and is removed", key.alias, path)
            with contextlib.suppress(OSError):
                (path / _MANIFEST).unlink()  # it is no copy any more; making room removes the rest
            raise NotKeptError
        self._verified.add(key)

    def _path(self, key: CopyKey) -> Path:
        return self._kept / key.bucket / key.alias / key.version


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[bool]:
    """Lock a folder; give whether it is locked and still what stands at its path."""
    try:
        descriptor = os.open(path, _OPEN_FOLDER)
    except OSError:
        yield False
        return
    try:
        yield _flock(descriptor, how) and _is_at(path, descriptor)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / _MANIFEST).read_bytes())["files"]
        return all(_sha256(path / file["name"]) == file["sha256"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(folder))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
