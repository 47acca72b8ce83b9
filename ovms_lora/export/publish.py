"""How a folder gets into the model repository: staged out of sight, made durable, renamed into place.

Owns: the repository's hidden folder, the lock per name, what a killed export leaves and how the next one clears it.
Does not know: what the folders hold.

For the folder `org/name` of repository R, R/.export (never taken for a model) holds

    org~name.lock            locked while the folder is exported; its owner's death frees it
    org~name.XXXX.staging    built here, then renamed to R/org/name
    org~name.XXXX.old        what was in that place before, between the two renames of an overwrite
    org~name.XXXX.removed    what is being removed

Killed between the renames: R/org/name is missing, and .old is put back. Killed after them: .old is removed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from ovms_lora.core.errors import ExportError

HIDDEN: Final = ".export"
_LEFTOVER: Final = re.compile(r"(?P<name>[A-Za-z0-9._~-]+)\.[0-9a-f]{8}\.(?P<kind>staging|old|removed)")


@contextmanager
def locked(repository: Path, name: str) -> Iterator[None]:
    """Hold the lock of a name; what dead exports of any name left is cleared first.

    Raises ExportError at once when another process exports this name.
    """
    hidden = repository / HIDDEN
    hidden.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(repository, name), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ExportError(f"another export of {name!r} is running", hint="wait for it, or stop it") from error
    try:
        _clear_leftovers(repository, name)
        for other in sorted({leftover for _, _, leftover in _leftovers(repository)} - {name}):
            _clear_if_dead(repository, other)
        yield
    finally:
        lock.release()


@contextmanager
def staging(repository: Path, name: str) -> Iterator[Path]:
    """Make the staging folder of a locked name; removed at the end, whatever happens within."""
    folder = _hidden_path(repository, name, "staging")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, repository: Path, name: str) -> None:
    """Rename the complete folder `staged` into its place, durably; what is there already is replaced."""
    target = repository / name
    sync_tree(staged)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = _hidden_path(repository, name, "old") if target.exists() else None
    if old is not None:
        target.replace(old)
    with ExitStack() as undo:
        if old is not None:
            undo.callback(old.replace, target)
        staged.replace(target)
        undo.pop_all()
    for folder in (target.parent, repository, old.parent if old else repository):
        sync_folder(folder)
    if old is not None:
        # The new folder is in place: whatever is in the way of removing the old one, the next export tries again.
        shutil.rmtree(old, ignore_errors=True)


def discard(repository: Path, name: str) -> None:
    """Take the folder of a locked name out of the repository in one rename, durably, then remove its files."""
    target, removed = repository / name, _hidden_path(repository, name, "removed")
    target.replace(removed)
    for folder in (target.parent, removed.parent):
        sync_folder(folder)
    shutil.rmtree(removed)
    parent = target.parent
    while parent != repository and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent


def sync_tree(folder: Path) -> None:
    """Make every file and folder below durable."""
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent, file), os.O_RDONLY)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_if_dead(repository: Path, name: str) -> None:
    try:
        with FileLock(_lock_path(repository, name), timeout=0):
            _clear_leftovers(repository, name)
    except Timeout:
        pass  # that export lives


def _clear_leftovers(repository: Path, name: str) -> None:
    """Finish or undo what a killed export of this name began; its lock must be held."""
    target = repository / name
    for path, kind, owner in _leftovers(repository):
        if owner != name:
            continue
        if kind == "old" and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            sync_folder(target.parent)
        else:
            shutil.rmtree(path)


def _leftovers(repository: Path) -> list[tuple[Path, str, str]]:
    """List (path, kind, name) of the staging and old folders."""
    found = [(path, _LEFTOVER.fullmatch(path.name)) for path in sorted((repository / HIDDEN).iterdir())]
    return [(path, match["kind"], match["name"].replace("~", "/")) for path, match in found if match]


def _hidden_path(repository: Path, name: str, kind: str) -> Path:
    return repository / HIDDEN / f"{_flat(name)}.{secrets.token_hex(4)}.{kind}"


def _lock_path(repository: Path, name: str) -> Path:
    return repository / HIDDEN / f"{_flat(name)}.lock"


def _flat(name: str) -> str:
    return name.replace("/", "~")  # which is in no name, so that two names never share a file
