"""SHA-256 of files and folders: the identity of sources, adapters and exported models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

_CHUNK = 4 * 2**20


def file_digest(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the hexadecimal SHA-256 of a file; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def files_digest(files: Iterable[Path], root: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return one SHA-256 over names (relative to `root`) and contents; the order given does not matter."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path, advance)}\n".encode())
    return digest.hexdigest()
