"""The loading path of one base: adapters that are loaded when a request first names them.

`FolderPath` and `BucketPath` have the same methods. Both tell the runtime what to take and what to let go; how an
adapter is read and registered is its work. The bucket's adapters are followed: one that has changed there takes the
place of the one before, one that was removed goes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ovms_lora.adapters.bucket import Bucket
from ovms_lora.adapters.bucket_source import BucketSource, StoredAdapter
from ovms_lora.adapters.disk_cache import DiskCache, default_cache_folder
from ovms_lora.adapters.sources import AdapterPlace, adapter_in, adapters_in
from ovms_lora.core.errors import (
    AdapterError,
    AdapterUnavailableError,
    ModelNotFoundError,
    OvmsLoraError,
    UnavailableError,
)
from ovms_lora.core.names import is_alias
from ovms_lora.engine.lora_config import LoraConfig

if TYPE_CHECKING:
    from ovms_lora.adapters.store import AdapterStore

log = logging.getLogger(__name__)


class Taker(Protocol):
    """What the runtime does for its loading path."""

    store: AdapterStore

    def has(self, name: str) -> bool:
        """Whether an adapter or composite is loaded under this name."""

    def take(self, path: LoadingPath, alias: str, place: AdapterPlace, *, replace: bool = False) -> None:
        """Load an adapter of the path, if it still is the runtime's."""

    def let_go(self, path: LoadingPath, place: AdapterPlace) -> None:
        """Unload the adapter that lies there, if the path still is the runtime's."""


class LoadingPath(Protocol):
    """Where a base finds adapters that nobody has configured; `is_far` when they come over a network."""

    is_far: bool

    def names(self) -> Sequence[str]:
        """Return the names of its adapters, as far as they are known. May read a disk."""

    def find(self, alias: str) -> bool | Future[bool]:
        """Whether it has an adapter. May read a disk, and never waits for a network: that is in the future."""

    def arriving(self, alias: str) -> Future[None] | None:
        """Begin to bring an adapter from far; None when there is nothing to wait for. May read a disk."""

    def bring(self, alias: str) -> None:
        """Load an adapter unless it is loaded; waits for it. Raises what loading raises."""

    def root(self, alias: str) -> str:
        """Return where an adapter lies, to be shown."""


class FolderPath:
    """Adapters in the folders below a local one."""

    is_far = False

    def __init__(self, taker: Taker, folder: Path) -> None:
        self._taker = taker
        self._folder = folder

    def names(self) -> Sequence[str]:
        """Return the names of the adapters that lie there."""
        return adapters_in(self._folder)

    def find(self, alias: str) -> bool:
        """Whether there is an adapter."""
        return adapter_in(self._folder, alias) is not None

    def arriving(self, alias: str) -> None:
        """Nothing comes from far."""

    def bring(self, alias: str) -> None:
        """Load an adapter unless it is loaded."""
        if alias in self._taker.store.registered:
            return
        folder = adapter_in(self._folder, alias)
        if folder is not None:
            self._taker.take(self, alias, folder)

    def root(self, alias: str) -> str:
        """Return the folder of an adapter."""
        return str(self._folder / alias)


class BucketPath:
    """Adapters in a bucket."""

    is_far = True

    def __init__(self, taker: Taker, source: BucketSource) -> None:
        self._taker = taker
        self._refused: dict[str, str] = {}  # the version that was refused, by alias
        self.source = source

    def names(self) -> Sequence[str]:
        """Return the names in the last listing; what is loaded and not in it any more is let go."""
        listing = self.source.listing()
        for entry in self._taker.store.registered.values() if listing.complete else ():
            is_gone = entry.alias not in listing.names and self.source.looked_at(entry.alias) < listing.at
            if is_gone and self._is_ours(entry.folder):
                self._let_go(entry.folder)
        return sorted(listing.names)

    def find(self, alias: str) -> bool | Future[bool]:
        """Whether the bucket has an adapter; in the future where it has to be asked."""
        known = self.source.knows(alias) if is_alias(alias) else False
        return self.source.flight.run(("find", alias), partial(self.source.find, alias)) if known is None else known

    def arriving(self, alias: str) -> Future[None] | None:
        """Begin to bring an adapter into memory. One that is there, or in the local cache, is only looked after."""
        store = self._taker.store
        entry = store.registered.get(alias)
        if not is_alias(alias) or (self._taker.has(alias) and not (entry and self._is_ours(entry.folder))):
            return None
        if entry and isinstance(entry.folder, StoredAdapter):
            if self.source.is_due(alias):
                self._begin_to_follow(alias, entry.folder)
            if store.holds(entry.digest) or self.source.cache.has(entry.folder.key):
                return None
        return self.source.flight.run(("bring", alias), partial(self._bring, alias))

    def bring(self, alias: str) -> None:
        """Load an adapter unless it is loaded; waits for the bucket."""
        pending = self.arriving(alias)
        if pending is not None:
            pending.result()

    def root(self, alias: str) -> str:
        """Return the address of an adapter."""
        return f"{self.source.bucket.url}/{alias}"

    def _bring(self, alias: str) -> None:
        """Load what an adapter is now. Raises ModelNotFoundError, AdapterUnavailableError or UnavailableError."""
        if self.source.knows(alias) is False:
            raise ModelNotFoundError(alias)
        try:
            place = self.source.current(alias)
            if place is None:
                raise ModelNotFoundError(alias)
            self._taker.take(self, alias, place, replace=True)
        except AdapterError as error:
            raise AdapterUnavailableError(error) from error

    def _begin_to_follow(self, alias: str, place: StoredAdapter) -> None:
        try:
            self.source.flight.run(("follow", alias), partial(self._follow, alias, place))
        except UnavailableError as error:
            log.info("adapter %s is not looked after now: %s", alias, error.message)

    def _follow(self, alias: str, place: StoredAdapter) -> None:
        """Bring an adapter to what the bucket has now; what does not work leaves it as it is."""
        try:
            now = self.source.current(alias)
            if now is None:
                self._let_go(place)
            elif now != place and self._refused.get(alias) != now.key.version:
                self._refused[alias] = now.key.version
                self._taker.take(self, alias, now, replace=True)
                del self._refused[alias]
                log.info("adapter %s has changed in %s; its new version is used from now on", alias, place)
        except AdapterError as error:
            log.warning("adapter %s has changed in %s and cannot be loaded: %s", alias, place, error.message)
        except OvmsLoraError as error:
            log.info("adapter %s stays as it is: %s", alias, error.message)

    def _is_ours(self, place: AdapterPlace) -> bool:
        return isinstance(place, StoredAdapter) and place.source is self.source

    def _let_go(self, place: AdapterPlace) -> None:
        self._taker.let_go(self, place)
        log.info("%s is gone and was unloaded", place)


def open_loading_path(taker: Taker, config: LoraConfig) -> LoadingPath | None:
    """Return the loading path of a configuration. Raises ConfigError when adapters of a bucket cannot be kept."""
    if config.loading_path is None:
        return None
    if isinstance(config.loading_path, Path):
        return FolderPath(taker, config.loading_path)
    cache = DiskCache(config.cache_folder or default_cache_folder(), config.cache_bytes)
    return BucketPath(taker, BucketSource(Bucket(config.loading_path), cache))
