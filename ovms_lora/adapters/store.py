"""AdapterStore: the adapters of one base model by alias, and the tier of them that is in host memory.

    alias ──► registered (folder, digest, strength) ──► host memory, at most `max_cpu_loras`, least recently used out
                                                   └──► read from its folder again when it is needed

Who uses an adapter holds the object itself, so one that leaves this tier, or is replaced under its alias, lives on
until its last request has ended. Safe from several threads; reading a folder blocks only those who want the same one.
Knows nothing of graphs and tiles.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from ovms_lora.adapters.adapter import Adapter, BaseLinears, load_adapter
from ovms_lora.adapters.sources import AdapterPlace, opened
from ovms_lora.core.errors import OvmsLoraError, UnknownAliasError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registered:
    """An adapter under its alias. `alpha` multiplies the adapter's own PEFT scaling."""

    alias: str
    folder: AdapterPlace
    alpha: float
    pinned: bool
    digest: str
    max_rank: int
    paths: frozenset[str]

    @classmethod
    def of(cls, alias: str, folder: AdapterPlace, adapter: Adapter, *, alpha: float, pinned: bool) -> Registered:
        """Return the entry of an adapter that was read from `folder`."""
        return cls(alias, folder, alpha, pinned, adapter.digest, adapter.max_rank, frozenset(adapter.layers))


class AdapterStore:
    """Adapters for one base, kept in `dtype`."""

    def __init__(self, base: BaseLinears, *, max_lora_rank: int, max_cpu_loras: int, dtype: np.dtype[Any]) -> None:
        self._base = base
        self._max_lora_rank = max_lora_rank
        self._max_cpu_loras = max_cpu_loras
        self._dtype = dtype
        self._lock = threading.Lock()
        self._registered: dict[str, Registered] = {}
        self._host: OrderedDict[str, Adapter] = OrderedDict()  # by digest, least recently used first
        self._alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._reading: dict[AdapterPlace, threading.Lock] = {}

    @property
    def registered(self) -> Mapping[str, Registered]:
        """The adapters by alias, as of now."""
        return dict(self._registered)

    def read(self, place: AdapterPlace) -> Adapter:
        """Read and check an adapter folder.

        Raises AdapterError, AdapterNotFoundError when there is no folder, or UnavailableError when a copy is gone.
        """
        with opened(place) as folder:
            adapter = load_adapter(folder, self._base, max_lora_rank=self._max_lora_rank, lora_dtype=self._dtype)
        for name in adapter.frozen_copies:
            log.info("%s: %s is a copy of the base's weight and is not used", place, name)
        with self._lock:
            adapter = self._alive.setdefault(adapter.digest, adapter)
            self._keep(adapter)
        return adapter

    def register(self, entry: Registered) -> None:
        """Give an adapter its alias, in place of another one that may have it."""
        with self._lock:
            before = self._registered.get(entry.alias)
            self._registered[entry.alias] = entry
            self._leave(before)

    def remove(self, alias: str) -> Registered:
        """Take an alias away. Raises UnknownAliasError when nothing has it."""
        with self._lock:
            entry = self._registered.pop(alias, None)
            if entry is None:
                raise UnknownAliasError(alias)
            self._leave(entry)
        return entry

    def get(self, alias: str) -> tuple[Registered, Adapter]:
        """Return an adapter by alias, read from its folder again when it is not in host memory.

        Raises UnknownAliasError, or AdapterError when the folder has gone bad meanwhile.
        """
        while True:
            found = self._found(self._entry(alias))
            if found is not None:
                return found

    def holds(self, digest: str) -> bool:
        """Whether an adapter is in memory. Does no I/O."""
        return digest in self._host or digest in self._alive

    def drop_unnamed(self) -> None:
        """Let go of adapters that no alias names: they were read for something that then failed."""
        with self._lock:
            named = {entry.digest for entry in self._registered.values()}
            for digest in self._host.keys() - named:
                del self._host[digest]

    def _entry(self, alias: str) -> Registered:
        entry = self._registered.get(alias)
        if entry is None:
            raise UnknownAliasError(alias)
        return entry

    def _found(self, entry: Registered) -> tuple[Registered, Adapter] | None:
        """Return the adapter of an entry as its folder has it now; None when the alias has been given away meanwhile.

        Whoever did that knows better what the alias stands for, and may already be writing the folder anew.
        """
        try:
            adapter = self._in_host(entry.digest) or self._read_once(entry)
        except OvmsLoraError:
            if self._registered.get(entry.alias) is entry:
                raise
            return None
        if adapter.digest == entry.digest:
            return entry, adapter
        changed = Registered.of(entry.alias, entry.folder, adapter, alpha=entry.alpha, pinned=entry.pinned)
        if not self._exchange(entry, changed):
            return None
        log.warning("adapter %s has changed in its folder; its new version is used from now on", entry.alias)
        return changed, adapter

    def _read_once(self, entry: Registered) -> Adapter:
        with self._one_reader(entry.folder):
            return self._in_host(entry.digest) or self.read(entry.folder)

    def _exchange(self, before: Registered, after: Registered) -> bool:
        """Put an entry in another's place; return False, and leave all as it is, when that is not there any more."""
        with self._lock:
            there = self._registered.get(before.alias) is before
            if there:
                self._registered[before.alias] = after
            self._leave(before if there else after)
        return there

    def _in_host(self, digest: str) -> Adapter | None:
        with self._lock:
            adapter = self._alive.get(digest)
            # One that only its last requests hold, and no alias names, does not come back.
            if adapter is not None and (digest in self._host or self._is_named(digest)):
                self._keep(adapter)
            return adapter

    def _leave(self, entry: Registered | None) -> None:
        """Let an adapter go that may have lost its last alias."""
        if entry and not self._is_named(entry.digest):
            self._host.pop(entry.digest, None)

    def _is_named(self, digest: str) -> bool:
        return any(entry.digest == digest for entry in self._registered.values())

    def _keep(self, adapter: Adapter) -> None:
        self._host[adapter.digest] = adapter
        self._host.move_to_end(adapter.digest)
        while len(self._host) > self._max_cpu_loras:
            self._host.popitem(last=False)

    @contextmanager
    def _one_reader(self, folder: AdapterPlace) -> Iterator[None]:
        with self._lock:
            reading = self._reading.setdefault(folder, threading.Lock())
        try:
            with reading:
                yield
        finally:
            with self._lock:
                if not reading.locked():
                    self._reading.pop(folder, None)
