"""BucketSource: the adapters of one bucket, brought into the local cache when they are needed.

    named ──► in the listing? ──► looked at in the bucket ──► downloaded once ──► a copy in the cache ──► read

Owns what is known of the bucket and for how long: the listing, when each adapter was last looked at, and what holds
while the bucket cannot be reached. Blocks where it says so. Knows nothing of bases and aliases that are loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ovms_lora.adapters.bucket import Bucket, BucketChangedError, Patience, StoredVersion
from ovms_lora.adapters.disk_cache import CopyKey, DiskCache, NotKeptError
from ovms_lora.adapters.single_flight import SingleFlight
from ovms_lora.core.errors import AdapterError, AdapterErrorCode, UnavailableError

log = logging.getLogger(__name__)

LISTING_SECONDS = 5.0
CHECK_SECONDS = 10.0

_DOWNLOADS_AT_ONCE = 8
_DOWNLOAD_SECONDS = 600.0
_LOOKS_AT_WHAT_CHANGES = 3
_FIRST_LISTING_SECONDS = 3.0
# Where a copy can be used instead, nobody waits for a bucket that does not answer.
_BRIEFLY = Patience(attempts=1, timeout=3.0)


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in a bucket, as of `at`; `complete` when a name that is not there is not in the bucket."""

    names: frozenset[str]
    complete: bool
    at: float


@dataclass(slots=True)
class DownloadCounts:
    """Downloads of adapters since the start."""

    succeeded: int = 0
    failed: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One version of an adapter of a bucket: where an adapter lies, as a folder is."""

    source: BucketSource = field(repr=False)
    key: CopyKey

    def __str__(self) -> str:
        return f"{self.source.bucket.url}/{self.key.alias}"

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """Give the folder of the copy, which stays until the end. Raises UnavailableError when there is none now."""
        try:
            with self.source.cache.held(self.key) as folder:
                yield folder
        except NotKeptError as error:
            raise UnavailableError(
                f"adapter '{self.key.alias}' has left the local cache; try again later", retry_after=1
            ) from error


class BucketSource:
    """Thread-safe. `check_seconds` is how long an adapter that was looked at is taken for unchanged."""

    def __init__(
        self,
        bucket: Bucket,
        cache: DiskCache,
        *,
        listing_seconds: float = LISTING_SECONDS,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self.bucket = bucket
        self.cache = cache
        self.flight = SingleFlight()
        self.counts = DownloadCounts()
        self._id = hashlib.sha256(str(bucket.url).encode()).hexdigest()[:16]
        self._listing_seconds = listing_seconds
        self._check_seconds = check_seconds
        self._listing = Listing(cache.aliases(self._id), complete=False, at=float("-inf"))
        self._patience = _FIRST_LISTING_SECONDS
        self._refreshing = threading.Lock()
        self._looked: dict[str, float] = {}
        self._downloading = threading.Semaphore(_DOWNLOADS_AT_ONCE)
        self._counting = threading.Lock()

    def listing(self) -> Listing:
        """Return the last listing, and have an old one renewed. Who asks first waits a moment for it.

        An outage keeps the last one.
        """
        if self._age() >= self._listing_seconds:
            seconds, self._patience = self._patience, 0.0
            with contextlib.suppress(UnavailableError, TimeoutError):
                self.flight.run("listing", self.refresh).result(seconds)
        return self._listing

    def refresh(self) -> Listing:
        """Return a listing that is not old. Blocks. Keeps the last one, incomplete, while there is an outage."""
        with self._refreshing:
            if self._age() >= self._listing_seconds:
                begun = time.monotonic()
                try:
                    self._listing = Listing(self.bucket.names(), complete=True, at=begun)
                except UnavailableError:
                    self._listing = Listing(self._listing.names, complete=False, at=time.monotonic())
            return self._listing

    def knows(self, alias: str) -> bool | None:
        """Whether the bucket has an adapter, None where it would have to be asked. Does no I/O."""
        listing = self._listing
        if alias in listing.names:
            return True
        return False if listing.complete and self._age() < self._listing_seconds else None

    def find(self, alias: str) -> bool:
        """Whether the bucket has an adapter. Blocks. Raises UnavailableError where that cannot be known."""
        listing = self.refresh()
        if listing.complete or alias in listing.names:
            return alias in listing.names
        return self.cache.newest(self._id, alias) is not None or self.bucket.look(alias) is not None

    def is_due(self, alias: str) -> bool:
        """Whether it is time to look whether an adapter has changed; the next time counts from now."""
        due = time.monotonic() - self._looked.get(alias, float("-inf")) >= self._check_seconds
        if due:
            self._looked[alias] = time.monotonic()
        return due

    def looked_at(self, alias: str) -> float:
        """Return when an adapter was last looked at, on the monotonic clock."""
        return self._looked.get(alias, float("-inf"))

    def current(self, alias: str) -> StoredAdapter | None:
        """Return what an adapter is now, with a copy in the cache; None when the bucket has it no more. Blocks.

        During an outage it is the copy that was last current. Raises UnavailableError, or AdapterError for what is too
        large.
        """
        kept = self.cache.newest(self._id, alias)
        if kept is not None and 0 <= time.time() - self.cache.checked(kept) < self._check_seconds:
            return StoredAdapter(self, kept)
        self._looked[alias] = time.monotonic()
        try:
            version = self.bucket.look(alias, _BRIEFLY if kept else None)
        except UnavailableError:
            if kept is None:
                raise
            return StoredAdapter(self, kept)
        return self._fetched(alias, version)

    def _fetched(self, alias: str, version: StoredVersion | None) -> StoredAdapter | None:
        for _ in range(_LOOKS_AT_WHAT_CHANGES):
            if version is None:
                self.cache.drop(self._id, alias)
                return None
            key = CopyKey(self._id, alias, version.id)
            try:
                self._fetch(key, version)
            except BucketChangedError:
                version = self.bucket.look(alias)
                continue
            self.cache.mark_checked(key)
            return StoredAdapter(self, key)
        raise UnavailableError(f"adapter '{alias}' is being changed in its bucket; try again later")

    def _fetch(self, key: CopyKey, version: StoredVersion) -> None:
        """Download a version unless there is a copy; nobody else does so at the same time."""
        if self.cache.has(key):
            return
        if version.nbytes > self.cache.max_bytes:
            raise AdapterError(
                AdapterErrorCode.UNSUPPORTED,
                f"the adapter has {version.nbytes} bytes, more than the adapter cache",
                hint="raise adapter_cache_size",
            )
        with self.cache.one_at_a_time(key.bucket, key.alias, seconds=_DOWNLOAD_SECONDS), self._downloading:
            if self.cache.has(key):
                return
            with self.cache.staged(version.nbytes) as folder, self._counted(version):
                self.bucket.download(version, folder)
                self.cache.keep(folder, key)
        log.info("adapter %s of %s was fetched, %.1f MB", key.alias, self.bucket.url, version.nbytes / 1e6)

    @contextlib.contextmanager
    def _counted(self, version: StoredVersion) -> Iterator[None]:
        whole = False
        try:
            yield
            whole = True
        finally:
            with self._counting:
                self.counts.succeeded += whole
                self.counts.failed += not whole
                self.counts.nbytes += version.nbytes if whole else 0

    def _age(self) -> float:
        return time.monotonic() - self._listing.at
