"""An adapter's folder and its files, held by descriptor.

Owns how hostile files are opened: relative to the folder's descriptor, never through a symbolic link, regular files
only, and each exactly once: what was checked is what is read. Reads by `pread`, because a mapped file that someone
truncates kills the process. Knows nothing of the formats inside.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ovms_lora.core.errors import AdapterError, AdapterErrorCode, AdapterNotFoundError, UnavailableError

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO without a writer would wait for ever.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# Not the adapter's fault: the same load can succeed later.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class AdapterFile:
    """One regular file of an adapter, open for reading. `code` is what its faults are reported as."""

    def __init__(self, folder_descriptor: int, name: str, descriptor: int) -> None:
        self.name = name
        self._folder_descriptor = folder_descriptor
        self._descriptor = descriptor
        self._stamp = _Stamp.of(os.fstat(descriptor))

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._stamp.size

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes at `offset`. Raises AdapterError(TRUNCATED)."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises AdapterError(TRUNCATED) where the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise _unreadable(AdapterErrorCode.TRUNCATED, self.name, error) from error
            if count == 0:
                raise AdapterError(
                    AdapterErrorCode.TRUNCATED, f"{self.name} ends at byte {offset + done}, more was expected"
                )
            done += count

    def check_unchanged(self) -> None:
        """Raise AdapterError(TRUNCATED) if the file was written to or replaced since it was opened."""
        try:
            same = self._stamp == _Stamp.of(os.fstat(self._descriptor)) == self._stamp_by_name()
        except OSError as error:
            raise _unreadable(AdapterErrorCode.TRUNCATED, self.name, error) from error
        if not same:
            raise AdapterError(
                AdapterErrorCode.TRUNCATED,
                f"{self.name} was changed while it was loaded",
                hint="write a new version to another folder, then rename it",
            )

    def _stamp_by_name(self) -> _Stamp:
        return _Stamp.of(os.stat(self.name, dir_fd=self._folder_descriptor, follow_symlinks=False))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


class AdapterFolder:
    """The folder of one adapter, as a context manager that closes what was opened through it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._files: list[AdapterFile] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        os.close(self._descriptor)

    def open(self, name: str, *, missing: AdapterErrorCode, unusable: AdapterErrorCode) -> AdapterFile:
        """Open the regular file `name`. Raises AdapterError(`missing`) or (`unusable`: link, FIFO, device, folder)."""
        file = self.open_if_there(name, unusable=unusable)
        if file is None:
            raise AdapterError(missing, f"the adapter folder holds no {name}")
        return file

    def open_if_there(self, name: str, *, unusable: AdapterErrorCode) -> AdapterFile | None:
        """Open the regular file `name`, None if there is no such file. Raises AdapterError(`unusable`)."""
        try:
            descriptor = os.open(name, _OPEN_FILE, dir_fd=self._descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _not_opened(unusable, name, error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise AdapterError(unusable, f"{name} is not a regular file")
        file = AdapterFile(self._descriptor, name, descriptor)
        self._files.append(file)
        return file

    def first_with_suffix(self, suffixes: frozenset[str]) -> str | None:
        """Return the name of a file that ends with one of `suffixes`, if the folder holds one."""
        with os.scandir(self._descriptor) as entries:
            return min((entry.name for entry in entries if Path(entry.name).suffix.lower() in suffixes), default=None)


def open_adapter_folder(path: Path) -> AdapterFolder:
    """Open the folder of one adapter; the folder itself may be a link, as the operator names it.

    Raises AdapterNotFoundError where there is no such folder.
    """
    try:
        return AdapterFolder(os.open(path, _OPEN_FOLDER))
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise UnavailableError(f"cannot open the adapter: {error.strerror}") from error
        raise AdapterNotFoundError(str(path)) from error
    except ValueError as error:  # a NUL byte in the path
        raise AdapterNotFoundError(str(path)) from error


def _not_opened(code: AdapterErrorCode, name: str, error: OSError) -> AdapterError | UnavailableError:
    if error.errno == errno.ELOOP:
        return AdapterError(code, f"{name} is a symbolic link", hint="put the file itself into the adapter folder")
    return _unreadable(code, name, error)


def _unreadable(code: AdapterErrorCode, name: str, error: OSError) -> AdapterError | UnavailableError:
    if error.errno in _EXHAUSTED:
        return UnavailableError(f"cannot open the adapter: {error.strerror}")
    return AdapterError(code, f"{name} cannot be read: {error.strerror}")
