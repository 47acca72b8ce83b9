"""Adapters of Google's and Azure's stores, over their protocols: what differs from S3 is what their libraries do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from azure.storage.blob import BlobServiceClient
from gcp_storage_emulator.server import create_server

from ovms_lora.adapters.bucket import Bucket, Patience
from ovms_lora.adapters.bucket_source import BucketSource
from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.disk_cache import DiskCache
from ovms_lora.core.errors import UnavailableError

QUICK = Patience(attempts=2, timeout=20, pause=0.01)
# The account that every Azurite has; its key is in Azurite's documentation.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class Store(ABC):
    """A store with one bucket named "bucket"."""

    @abstractmethod
    def url(self, bucket: str) -> str:
        """Return the address of the folder `loras` of a bucket."""

    @abstractmethod
    def put(self, path: str, content: bytes) -> None:
        """Write an object of the bucket."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove an object of the bucket."""


class Google(Store):
    def __init__(self, host: str) -> None:
        self._host = host

    def url(self, bucket: str) -> str:
        return f"gs://{bucket}/loras"

    def put(self, path: str, content: bytes) -> None:
        place = f"{self._host}/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(path, safe='')}"
        httpx.post(place, content=content, trust_env=False).raise_for_status()

    def remove(self, path: str) -> None:
        place = f"{self._host}/storage/v1/b/bucket/o/{quote(path, safe='')}"
        httpx.delete(place, trust_env=False).raise_for_status()


class Azure(Store):
    def __init__(self, service: BlobServiceClient) -> None:
        self._container = service.create_container("bucket")

    def url(self, bucket: str) -> str:
        return f"abfss://{bucket}@{ACCOUNT}.dfs.core.windows.net/loras"

    def put(self, path: str, content: bytes) -> None:
        self._container.upload_blob(path, content, overwrite=True)

    def remove(self, path: str) -> None:
        self._container.delete_blob(path)


@pytest.fixture(params=["gs", "abfss"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if request.param == "gs":
        with google() as host:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
            yield Google(host)
        return
    if not shutil.which("azurite-blob"):
        pytest.skip("needs Azurite: npm install --global azurite")
    with azurite() as connection, BlobServiceClient.from_connection_string(connection) as service:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield Azure(service)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def google() -> Iterator[str]:
    port = free_port()
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def azurite() -> Iterator[str]:
    port = free_port()
    flags = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)]
    process = subprocess.Popen(["azurite-blob", *flags], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not is_open(port):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        place = f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"
        yield f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};{place}"
    finally:
        process.terminate()
        process.wait(10)


def source(store: Store, cache: Path, bucket: str = "bucket") -> BucketSource:
    """A source for which a listing, and what it has looked at, is old at once."""
    found = Bucket(BucketUrl.parse(store.url(bucket)), QUICK)
    return BucketSource(found, DiskCache(cache, 10**9), listing_seconds=0, check_seconds=0)


def weights(source: BucketSource, alias: str) -> bytes | None:
    adapter = source.current(alias)
    if adapter is None:
        return None
    with adapter.opened() as folder:
        return (folder / "adapter_model.safetensors").read_bytes()


def test_adapters_are_listed_fetched_followed_and_taken_away(store: Store, tmp_path: Path) -> None:
    large = os.urandom(12_000_000)  # in several parts, where a library does that
    for alias, content in (("sql", large), ("tools", b"x")):
        store.put(f"loras/{alias}/adapter_config.json", b"{}")
        store.put(f"loras/{alias}/adapter_model.safetensors", content)
    store.put("loras/empty/adapter_model.safetensors", b"x")
    store.put("loras/adapter_config.json", b"{}")
    store.put("loras/sql/checkpoint-1/adapter_config.json", b"{}")
    adapters = source(store, tmp_path)
    listing = adapters.refresh()
    assert (set(listing.names), listing.complete) == ({"sql", "tools"}, True)
    assert weights(adapters, "sql") == large
    store.put("loras/sql/adapter_model.safetensors", b"another")
    assert weights(adapters, "sql") == b"another"
    assert not adapters.find("nothing") and weights(adapters, "nothing") is None
    store.remove("loras/sql/adapter_config.json")
    assert weights(adapters, "sql") is None
    assert set(adapters.refresh().names) == {"tools"}


def test_a_missing_bucket_is_no_empty_one(store: Store, tmp_path: Path) -> None:
    assert source(store, tmp_path).refresh().complete
    missing = source(store, tmp_path, "no-such-bucket")
    assert not missing.refresh().complete
    with pytest.raises(UnavailableError) as refused:
        missing.bucket.names()
    assert "no such bucket" in (refused.value.hint or "")
