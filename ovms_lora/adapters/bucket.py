"""Bucket: what lies below one address of an object store, asked for through fsspec.

Owns attempts, timeouts, what an outage is, and which objects make an adapter: no name from the bucket ever becomes the
name of a local file. Blocks, so it is for threads. Knows nothing of what is kept locally.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.peft_config import CONFIG_NAME
from ovms_lora.adapters.safetensors_file import PICKLE_SUFFIXES, WEIGHTS_NAME
from ovms_lora.adapters.template_files import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME
from ovms_lora.core.errors import AdapterError, AdapterErrorCode, UnavailableError
from ovms_lora.core.names import is_alias

log = logging.getLogger(__name__)

T = TypeVar("T")

_WANTED = (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME, TOKENIZER_CONFIG_NAME)
# Stands for weights of another format, so that the adapter is refused for what it is.
_PICKLE_NAME = "adapter_model.bin"
_LARGEST_BESIDE_WEIGHTS = 4 << 20
_MOST_OBJECTS = 10_000

_POLL_SECONDS = 0.25
REST_SECONDS = 5
_OPTIONS: dict[str, dict[str, Any]] = {
    # One request for each object; attempts are counted here.
    "s3": {"max_concurrency": 1, "config_kwargs": {"connect_timeout": 10, "retries": {"total_max_attempts": 1}}},
    "gs": {},
    "abfss": {"max_concurrency": 1},
}
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION_STRING|SAS", re.IGNORECASE)


class BucketChangedError(Exception):
    """What was to be downloaded is not there any more, or not as it was: look again."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One object of an adapter; `etag` changes with its content."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """An adapter as it lies in the bucket; two are equal when all of their objects are."""

    alias: str
    files: tuple[StoredFile, ...]
    pickled: bool = False

    @property
    def id(self) -> str:
        """A name of this version that may be a file's."""
        files = [[file.name, file.size, file.etag] for file in self.files]
        return hashlib.sha256(json.dumps([files, self.pickled]).encode()).hexdigest()[:32]

    @property
    def nbytes(self) -> int:
        """Bytes of its objects."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Patience:
    """How often something is tried, and how many seconds may pass without an answer or another byte."""

    attempts: int = 3
    timeout: float = 30.0
    pause: float = 0.5


PATIENCE = Patience()


class _FaultError(Exception):
    """What a library of a store has raised, in words that may be logged."""

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Bucket:
    """The adapters below one address. Safe from several threads."""

    def __init__(self, url: BucketUrl, patience: Patience | None = None) -> None:
        self.url = url
        self._patience = patience or PATIENCE
        self._opening = threading.Lock()
        self._opened: tuple[Any, str] | None = None
        self._down_until = 0.0
        self._fault = ""

    def names(self) -> frozenset[str]:
        """Return the names of all folders that hold an adapter_config.json. Raises UnavailableError."""
        try:
            paths = self._called(lambda fs, root: fs._find(root))
            if not paths and self.url.scheme == "abfss":  # where a container that is missing looks like an empty one
                self._called(lambda fs, root: fs._ls(root.split("/")[0]))
        except FileNotFoundError as error:
            raise self._unavailable("there is no such bucket") from error
        _, root = self._open()
        split = (path.removeprefix(f"{root}/").split("/") for path in paths)
        return frozenset(
            parts[0] for parts in split if len(parts) == 2 and parts[1] == CONFIG_NAME and is_alias(parts[0])
        )

    def look(self, alias: str, patience: Patience | None = None) -> StoredVersion | None:
        """Return what an adapter is in the bucket now, None if it is not there.

        Raises UnavailableError, or AdapterError for what is larger than any adapter.
        """
        try:
            entries = self._called(lambda fs, root: fs._ls(f"{root}/{alias}", detail=True), patience)
        except FileNotFoundError:
            return None
        if len(entries) > _MOST_OBJECTS:
            raise AdapterError(
                AdapterErrorCode.CONFIG_INVALID, f"the folder of {alias} holds more than {_MOST_OBJECTS} objects"
            )
        objects = {PurePosixPath(entry["name"]).name: entry for entry in entries if entry["type"] == "file"}
        if CONFIG_NAME not in objects:
            return None
        files = tuple(_stored_file(name, objects[name]) for name in _WANTED if name in objects)
        pickled = WEIGHTS_NAME not in objects and any(Path(name).suffix.lower() in PICKLE_SUFFIXES for name in objects)
        return StoredVersion(alias, files, pickled)

    def download(self, version: StoredVersion, folder: Path) -> None:
        """Write the files of an adapter into a folder. Raises UnavailableError or BucketChangedError."""
        for file in version.files:
            target = folder / file.name
            try:
                self._called(
                    lambda fs, root, name=file.name, target=target: fs._get_file(
                        f"{root}/{version.alias}/{name}", str(target)
                    ),
                    written=target,
                    limit=file.size,
                )
            except FileNotFoundError as error:
                raise BucketChangedError from error
            if target.stat().st_size != file.size:
                raise BucketChangedError
        if version.pickled:
            (folder / _PICKLE_NAME).touch()
        if self.look(version.alias) != version:
            raise BucketChangedError

    def _called(
        self,
        ask: Callable[..., Coroutine[Any, Any, Any]],
        patience: Patience | None = None,
        *,
        written: Path | None = None,
        limit: int = 0,
    ) -> Any:
        """Return the answer to one question, asked several times if need be.

        Raises UnavailableError, or FileNotFoundError where the store says so.
        """
        patience = patience or self._patience
        if time.monotonic() < self._down_until:
            raise self._unavailable(self._fault)
        for attempt in range(1, patience.attempts + 1):
            try:
                answer = self._asked(ask, patience.timeout, written, limit)
            except FileNotFoundError:
                self._reached()
                raise
            except _FaultError as fault:
                if not fault.may_pass:  # the store answers, or it is not the store
                    raise self._unavailable(str(fault)) from fault
                if attempt == patience.attempts:
                    self._down_until = time.monotonic() + REST_SECONDS
                    raise self._unavailable(str(fault)) from fault
                time.sleep(patience.pause * 2 ** (attempt - 1))
            else:
                self._reached()
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _asked(
        self, ask: Callable[..., Coroutine[Any, Any, Any]], timeout: float, written: Path | None, limit: int
    ) -> Any:
        try:
            fs, root = self._open()
            future = asyncio.run_coroutine_threadsafe(ask(fs, root), fs.loop)
            return _answer(future, timeout, written, limit)
        except (FileNotFoundError, BucketChangedError):
            raise
        except Exception as error:  # three libraries, each with errors of its own and of what it is built on
            lasting = isinstance(error, PermissionError | ImportError)
            lasting = lasting or (isinstance(error, OSError) and error.errno in _DISK_FAULTS)
            raise _FaultError(_told(error), may_pass=not lasting) from error

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the path of the address in it. The libraries take a second to load."""
        with self._opening:
            if self._opened is None:
                from fsspec.core import url_to_fs

                options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS[self.url.scheme]}
                fs, root = url_to_fs(str(self.url), **options)
                if self.url.scheme == "s3":
                    fs.retries = 1  # it would try five times in each of our attempts
                if self.url.scheme == "gs":
                    logging.getLogger("gcsfs").addFilter(_is_of_interest)
                self._opened = fs, root.rstrip("/")
            return self._opened

    def _reached(self) -> None:
        if self._fault:
            log.info("%s is reached again", self.url)
        self._fault, self._down_until = "", 0.0

    def _unavailable(self, fault: str) -> UnavailableError:
        if fault != self._fault:
            log.warning("%s cannot be read: %s", self.url, fault)
        self._fault = fault
        return UnavailableError(
            "the bucket of this adapter cannot be read now; try again later",
            hint=f"{self.url}: {fault}; check the address, the network, and the credentials in the environment",
            retry_after=REST_SECONDS,
        )


def _is_of_interest(record: logging.LogRecord) -> bool:
    # gcsfs says so at every question, where it may not ask for the kind of a bucket.
    return "determine bucket type" not in record.getMessage()


def _answer(future: Future[Any], timeout: float, written: Path | None, limit: int) -> Any:
    """Wait for an answer, as long as it comes or the file that is written grows, up to `limit` bytes."""
    size, since = 0, time.monotonic()
    while True:
        try:
            return future.result(_POLL_SECONDS)
        except TimeoutError:
            if future.done():
                return future.result()
        now = _size(written)
        if written is not None and now > limit:
            future.cancel()
            raise BucketChangedError
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > timeout:
            future.cancel()
            raise TimeoutError(f"no answer in {timeout:g} s")


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path else 0
    except FileNotFoundError:
        return 0


def _stored_file(name: str, entry: dict[str, Any]) -> StoredFile:
    size = int(entry["size"] or 0)
    if name != WEIGHTS_NAME and size > _LARGEST_BESIDE_WEIGHTS:
        raise AdapterError(
            AdapterErrorCode.CONFIG_INVALID, f"{name} has {size} bytes, more than {_LARGEST_BESIDE_WEIGHTS}"
        )
    return StoredFile(name, size, str(entry.get("ETag") or entry.get("etag") or entry.get("generation") or ""))


def _told(error: Exception) -> str:
    """Return an error on one line, without any secret of the environment that it may repeat."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET.search(name):
            text = text.replace(value, "***")
    return re.sub(r"//[^/\s@]*@", "//***@", text)[:300]
