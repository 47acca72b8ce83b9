"""Addresses of buckets: what is taken, what is refused, and which library reads them."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from fsspec.core import url_to_fs

from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.sources import loading_path
from ovms_lora.core.errors import ConfigError

GOOD = {
    "s3://bucket": ("S3FileSystem", "bucket"),
    "s3://bucket/loras/": ("S3FileSystem", "bucket/loras"),
    "s3://my.bucket-1/a/b=c/d": ("S3FileSystem", "my.bucket-1/a/b=c/d"),
    "gs://bucket/loras": ("GcsFileSystem", "bucket/loras"),
    "abfss://loras@account.dfs.core.windows.net/a/b": ("AzureBlobFileSystem", "loras/a/b"),
}


@pytest.mark.parametrize("text", GOOD)
def test_a_library_takes_the_address(text: str) -> None:
    """For gs:// and abfss:// no server can be had here: this is as far as they are tried."""
    kind, path = GOOD[text]
    url = loading_path(text, Path("/config"))
    assert str(url) == text.rstrip("/")
    fs, root = url_to_fs(str(url), skip_instance_cache=True, use_listings_cache=False)
    assert (type(fs).__name__.removeprefix("Extended"), root) == (kind, path)
    assert fs.async_impl
    if kind == "AzureBlobFileSystem":
        assert fs.account_name == "account"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://key:secret@bucket/loras", "carries credentials"),
        ("s3://secret@bucket/loras", "carries credentials"),
        ("gs://key:secret@bucket/loras", "carries credentials"),
        ("abfss://loras:secret@account.dfs.core.windows.net/a", "carries credentials"),
        ("abfss://loras@account.dfs.core.windows.net/a?sig=secret", "carries credentials or parameters"),
        ("s3://bucket/a?versionId=secret", "carries credentials or parameters"),
        ("s3://", "is not one of a bucket"),
        ("s3:///loras", "is not one of a bucket"),
        ("s3://bucket/../secret", "is not one of a bucket"),
        ("s3://bucket/./secret", "is not one of a bucket"),
        ("s3://bucket//secret", "is not one of a bucket"),
        ("s3://bucket/*/secret", "is not one of a bucket"),
        ("s3://bucket/a b", "is not one of a bucket"),
        ("abfss://account/secret", "is not one of a bucket"),
        ("abfss://loras@secret.example.com/a", "is not one of a bucket"),
        ("https://user:secret@example.com/loras", "not loaded from https://"),
        ("se cret://bucket", "not loaded from this"),
    ],
)
def test_what_is_no_address_is_refused_and_never_repeated(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        BucketUrl.parse(text)
    assert "secret" not in refused.value.message
    assert "secret" not in (refused.value.hint or "").lower().replace("aws_secret_access_key", "")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_gcsfs(name: str) -> ModuleSpec | None:
        return None if name == "gcsfs" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_gcsfs)
    with pytest.raises(ConfigError, match="gs:// needs the package gcsfs") as refused:
        loading_path("gs://bucket/loras", Path())
    assert refused.value.hint == 'pip install "ovms-lora[ray]"'


def test_other_texts_are_folders() -> None:
    assert loading_path("loras", Path("/config")) == Path("/config/loras")
