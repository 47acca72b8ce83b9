"""Adapters of a bucket, over S3's protocol: fetched once, followed, kept through outages, and never half."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ovms_lora.adapters import bucket_source
from ovms_lora.adapters.bucket import Bucket, Patience
from ovms_lora.adapters.bucket_source import BucketSource, StoredAdapter
from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.disk_cache import DiskCache
from ovms_lora.core.errors import AdapterError, UnavailableError
from tests.adapters.adapter_files import write_adapter
from tests.object_store import ObjectStore

QUICK = Patience(attempts=3, timeout=5, pause=0.01)


@pytest.fixture
def loras(store: ObjectStore, tmp_path: Path) -> str:
    """The address, without its scheme, of a folder in a bucket that holds sql, tools and things that are no adapter."""
    place = f"{store.bucket()}/loras"
    for alias in ("sql", "tools"):
        store.upload(write_adapter(tmp_path / alias), f"{place}/{alias}")
    store.put(f"{place}/empty/adapter_model.safetensors", b"x")
    store.put(f"{place}/adapter_config.json", b"{}")
    store.put(f"{place}/sql/checkpoint-1/adapter_config.json", b"{}")
    store.put(f"{place}/two%20words/adapter_config.json", b"{}")
    store.put(f"{place}/text/adapter_config.json", b"{}")
    return place


def source(
    place: str, cache: Path, *, gigabytes: float = 1, patience: Patience = QUICK, age: float = 0
) -> BucketSource:
    """A source for which a listing, and what it has looked at, is old after `age` seconds."""
    bucket = Bucket(BucketUrl.parse(f"s3://{place}"), patience)
    return BucketSource(bucket, DiskCache(cache, int(gigabytes * 1e9)), listing_seconds=age, check_seconds=age)


def content(adapter: StoredAdapter | None, name: str = "adapter_config.json") -> bytes:
    assert adapter
    with adapter.opened() as folder:
        return (folder / name).read_bytes()


def files(cache: Path) -> list[Path]:
    return [path for path in (cache / "kept").rglob("*") if path.is_file()]


def weights(size: int) -> dict[str, bytes]:
    return {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(size)}


def test_only_adapters_are_listed(loras: str, tmp_path: Path) -> None:
    listing = source(loras, tmp_path / "cache").refresh()
    assert (set(listing.names), listing.complete) == ({"sql", "tools"}, True)
    empty = source(f"{Path(loras).parent}/nothing", tmp_path / "cache").refresh()
    assert (len(empty.names), empty.complete) == (0, True)


def test_a_missing_bucket_is_no_empty_one(store: ObjectStore, tmp_path: Path) -> None:
    missing = source("no-such-bucket", tmp_path / "cache")
    assert not missing.refresh().complete
    with pytest.raises(UnavailableError) as refused:
        missing.bucket.names()
    assert "no such bucket" in (refused.value.hint or "")


def test_many_threads_and_sources_get_each_object_once(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.slow = 0.05
    sources = [source(loras, tmp_path / "cache", age=60) for _ in range(3)]
    got: list[StoredAdapter | None] = []
    threads = [
        threading.Thread(target=lambda each=each: got.append(each.current("sql")), daemon=True)
        for each in sources
        for _ in range(4)
    ]
    with store.counted() as counts:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({adapter.key for adapter in got if adapter}) == 1
    assert len(got) == len(threads)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert counts["GET", f"/{loras}/sql/{name}"] == 1
    assert content(got[0]) == (tmp_path / "sql" / "adapter_config.json").read_bytes()
    assert sum(each.counts.succeeded for each in sources) == 1


OTHER_PROCESS = """
import sys
from pathlib import Path
from ovms_lora.adapters.bucket import Bucket
from ovms_lora.adapters.bucket_source import BucketSource
from ovms_lora.adapters.bucket_url import BucketUrl
from ovms_lora.adapters.disk_cache import DiskCache
source = BucketSource(Bucket(BucketUrl.parse(sys.argv[1])), DiskCache(Path(sys.argv[2]), 10**9))
source.bucket.names()
print("ready", flush=True)
sys.stdin.readline()
with source.current("sql").opened() as folder:
    print(folder, flush=True)
"""


def other_process(place: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, f"s3://{place}", str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def test_two_processes_get_each_object_once(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.slow = 0.05
    processes = [other_process(loras, tmp_path / "cache") for _ in range(2)]
    assert [heard(process) for process in processes] == ["ready", "ready"]
    with store.counted() as counts:
        for process in processes:
            say(process, "go")
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert len(set(outputs)) == 1 and Path(outputs[0].strip()).is_dir()
    assert counts["GET", f"/{loras}/sql/adapter_model.safetensors"] == 1
    assert counts["GET", f"/{loras}/sql/adapter_config.json"] == 1


def test_a_process_killed_in_mid_download_leaves_nothing(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.flowing.clear()
    process = other_process(loras, tmp_path / "cache")
    assert heard(process) == "ready"
    say(process, "go")
    staging = tmp_path / "cache" / "staging"
    until(lambda: any(staging.glob("*/adapter_model.safetensors")))
    process.kill()
    process.communicate()
    store.flowing.set()
    assert files(tmp_path / "cache") == []
    after = source(loras, tmp_path / "cache")
    assert content(after.current("sql")) == (tmp_path / "sql" / "adapter_config.json").read_bytes()
    assert list(staging.iterdir()) == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_change_and_a_removal_are_seen(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    following = source(loras, tmp_path / "cache")
    first = following.current("sql")
    assert following.current("sql") == first
    store.put(f"{loras}/sql/adapter_config.json", b'{"new": 1}')
    second = following.current("sql")
    assert (content(second), second != first) == (b'{"new": 1}', True)
    assert content(first) != content(second), "a version is never written to"
    store.remove(f"{loras}/sql", "adapter_config.json")
    assert following.current("sql") is None
    until(lambda: following.listing().names == {"tools"})
    assert following.current("nothing") is None


def test_an_outage(store: ObjectStore, loras: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = source(loras, tmp_path / "cache")
    sql, names = before.current("sql"), before.refresh().names
    store.down = True
    begun = time.monotonic()
    assert before.current("sql") == sql
    until(lambda: not before.listing().complete)
    assert before.listing().names == names
    restarted = source(loras, tmp_path / "cache")
    again = restarted.current("sql")
    assert again and sql and again.key == sql.key
    assert restarted.find("sql")
    for each in (before, restarted):
        with pytest.raises(UnavailableError) as refused:
            each.current("tools")
        assert (refused.value.retry_after, "s3://" in (refused.value.hint or "")) == (5, True)
    with pytest.raises(UnavailableError):
        restarted.find("stranger")
    assert time.monotonic() - begun < 5
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 2, "once for each"


def test_an_outage_is_asked_about_three_times_then_left_alone(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.down = True
    bucket = source(loras, tmp_path / "cache").bucket
    with store.counted() as counts:
        for _ in range(5):
            with pytest.raises(UnavailableError):
                bucket.look("sql")
    assert counts.total() == 3


def test_a_short_fault_passes(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.down = True
    threading.Timer(0.3, store.heal).start()
    patient = source(loras, tmp_path / "cache", patience=replace(QUICK, pause=0.3))
    assert content(patient.current("sql"))


def test_a_download_that_stands_still_is_given_up(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.flowing.clear()
    hasty = source(loras, tmp_path / "cache", patience=Patience(attempts=1, timeout=3))
    hasty.refresh()
    with pytest.raises(UnavailableError) as refused:
        hasty.current("sql")
    assert "no answer in 3 s" in (refused.value.hint or "")
    assert (files(tmp_path / "cache"), hasty.counts.failed) == ([], 1)


@pytest.mark.parametrize("address", ["127.0.0.1:9/testing-secret", "user:testing-secret@127.0.0.1:9"])
def test_secrets_stay_out_of_logs_and_errors(
    address: str,
    store: ObjectStore,
    loras: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, logger="ovms_lora")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    with pytest.raises(UnavailableError) as refused:
        source(loras, tmp_path / "cache").current("sql")
    hint = refused.value.hint or ""
    assert "s3://" in hint
    assert not any(secret in hint + caplog.text for secret in ("testing-secret", "testing-key", "user:"))


def test_denied_credentials_are_no_outage(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.denied = True
    denied = source(loras, tmp_path / "cache")
    with store.counted() as counts, pytest.raises(UnavailableError) as refused:
        denied.bucket.look("sql")
    assert (counts.total(), "credentials" in (refused.value.hint or "")) == (1, True)
    store.heal()
    assert content(denied.current("sql")), "there is nothing to wait out"


def test_names_from_the_bucket_never_become_names_of_files(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    for name in ("%2e%2e/%2e%2e/escaped", "..%2fescaped", "extra.py", "adapter_config.json%00", "x" * 300):
        store.put(f"{loras}/sql/{name}", b"hostile")
    adapter = source(loras, tmp_path / "cache").current("sql")
    assert adapter
    with adapter.opened() as folder:
        names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "checked"}
    assert not list(tmp_path.rglob("*escaped*"))


def test_what_is_too_large_is_refused_before_it_is_downloaded(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    store.put(f"{loras}/big/adapter_config.json", b"{}")
    store.put(f"{loras}/big/adapter_model.safetensors", bytes(300_000))
    store.put(f"{loras}/odd/adapter_config.json", bytes(5 << 20))
    small = source(loras, tmp_path / "cache", gigabytes=0.0002)
    with store.counted() as counts:
        with pytest.raises(AdapterError, match="more than the adapter cache"):
            small.current("big")
        with pytest.raises(AdapterError, match=r"adapter_config.json has 5242880 bytes"):
            small.current("odd")
    assert not any(path.endswith(("json", "safetensors")) for _, path in counts)


def test_the_cache_is_bounded_by_bytes(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    for at in range(5):
        for name, of in weights(100_000).items():
            store.put(f"{loras}/a{at}/{name}", of)
    bounded = source(loras, tmp_path / "cache", gigabytes=0.00035)
    for at in (0, 1, 2, 0, 3, 4):
        assert content(bounded.current(f"a{at}"), "adapter_model.safetensors")
        assert sum(path.stat().st_size for path in files(tmp_path / "cache")) <= 350_000
    kept = {path.name for path in (tmp_path / "cache" / "kept").glob("*/*")}
    assert kept == {"a0", "a3", "a4"}


def test_an_adapter_that_changes_while_it_is_downloaded_is_taken_in_one_version(
    store: ObjectStore, loras: str, tmp_path: Path
) -> None:
    store.flowing.clear()
    following = source(loras, tmp_path / "cache")
    flying = following.flight.run("sql", lambda: following.current("sql"))
    until(lambda: any((tmp_path / "cache" / "staging").glob("*/adapter_model.safetensors")))
    store.put(f"{loras}/sql/adapter_config.json", b'{"new": 1}')
    store.flowing.set()
    assert content(flying.result(30)) == b'{"new": 1}'
    assert len(list((tmp_path / "cache" / "kept").glob("*/sql/*"))) == 1


def test_what_was_looked_at_lately_is_not_looked_at_again(store: ObjectStore, loras: str, tmp_path: Path) -> None:
    assert bucket_source.CHECK_SECONDS == 10
    fresh = source(loras, tmp_path / "cache", age=60)
    assert fresh.current("sql")
    assert fresh.listing().complete
    with store.counted() as counts:
        assert fresh.current("sql")
        assert source(loras, tmp_path / "cache", age=60).current("sql"), "by any process of this machine"
        assert (fresh.knows("sql"), fresh.knows("stranger")) == (True, False)
        assert fresh.listing().names == {"sql", "tools"}
        assert not fresh.is_due("sql")
    assert counts.total() == 0
