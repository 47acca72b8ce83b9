"""ChangeLog: what clients have changed in all replicas: adapters loaded and unloaded, the configuration read again.

    version   1          2           3            4
              load sql   load mail   unload sql   reload         of an alias only the last change counts

Owns the order, and how a replica that has seen a part of it, or nothing, gets the rest. Knows no Ray and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from ovms_lora.server.adapter_updates import NewAdapter

# A replica that starts needs these only for adapters of config.json that were unloaded.
MAX_UNLOADED = 4096


class ChangeKind(StrEnum):
    """What a change does."""

    LOAD = "load"
    UNLOAD = "unload"
    RELOAD = "reload"


@dataclass(frozen=True, slots=True)
class Change:
    """One change; `adapter` is there for a load, `alias` is empty for a reload."""

    kind: ChangeKind
    alias: str = ""
    adapter: NewAdapter | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Some changes, each with its version, oldest first; `version` is that of the log."""

    version: int
    changes: tuple[tuple[int, Change], ...] = ()


class ChangeLog:
    """The changes that still count."""

    def __init__(self) -> None:
        self._changes: dict[str, tuple[int, Change]] = {}  # by alias, oldest first
        self._unloaded: dict[str, None] = {}
        self.version = 0

    def add(self, change: Change) -> int:
        """Add a change; return the version."""
        return self._put(self.version + 1, change)

    def since(self, version: int) -> History:
        """Return what has changed after a version."""
        return History(self.version, tuple(reversed(list(self._newer(version)))))

    def take(self, history: History) -> None:
        """Take over changes of another log that this one does not have."""
        for version, change in history.changes:
            if version > self.version:
                self._put(version, change)
        self.version = max(self.version, history.version)

    def go_on_from(self, history: History) -> None:
        """Put a longer log before what is here: the changes of this one count as made after it."""
        own = [change for _, change in self.since(0).changes]
        self._changes.clear()
        self._unloaded.clear()
        self.version = 0
        self.take(history)
        for change in own:
            self.add(change)

    def _put(self, version: int, change: Change) -> int:
        self._changes.pop(change.alias, None)
        self._unloaded.pop(change.alias, None)
        self._changes[change.alias] = (version, change)
        if change.kind is ChangeKind.UNLOAD:
            self._unloaded[change.alias] = None
            if len(self._unloaded) > MAX_UNLOADED:
                oldest = next(iter(self._unloaded))
                del self._unloaded[oldest], self._changes[oldest]
        self.version = version
        return version

    def _newer(self, version: int) -> Iterator[tuple[int, Change]]:
        for entry in reversed(self._changes.values()):
            if entry[0] <= version:
                return
            yield entry


def newest(histories: Iterable[History]) -> History:
    """Return the history that knows most; an empty one when there is none."""
    return max(histories, key=lambda history: history.version, default=History(0))
