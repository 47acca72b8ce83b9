"""A bucket as loading path, over S3's protocol: listed, loaded when named, followed, and served through outages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from ovms_lora import cli
from ovms_lora.adapters import bucket
from ovms_lora.adapters.bucket import Patience
from ovms_lora.adapters.bucket_source import BucketSource
from ovms_lora.server.errors import OVMS_PREFIX
from tests.adapters.adapter_files import good_config, write_adapter
from tests.object_store import ObjectStore
from tests.server.serving import Served, serving, write_adapters, write_lora_config

pytestmark = pytest.mark.anyio

GREEDY = {"prompt": "hello", "temperature": 0, "max_tokens": 12}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings and looks are old soon, and an outage is known at once."""
    defaults = BucketSource.__init__.__kwdefaults__
    assert defaults
    for name in ("listing_seconds", "check_seconds"):
        monkeypatch.setitem(defaults, name, 0.1)
    monkeypatch.setattr(bucket, "REST_SECONDS", 1)
    monkeypatch.setattr(bucket, "PATIENCE", Patience(attempts=2, timeout=20, pause=0.01))


@pytest.fixture
def loras(store: ObjectStore, tmp_path: Path) -> str:
    """A folder in a bucket with `far` and `further`, and one that is bad."""
    place = f"{store.bucket()}/loras"
    for alias in ("far", "further"):
        store.upload(write_adapters(tmp_path / "near", alias) / alias, f"{place}/{alias}")
    store.put(f"{place}/bad/adapter_config.json", b"{")
    store.put(f"{place}/pickled/adapter_config.json", json.dumps(good_config()).encode())
    store.put(f"{place}/pickled/adapter_model.bin", b"\x80\x04")
    return place


def config(tmp_path: Path, loras: str, **options: object) -> Path:
    cache = {"adapter_cache_path": "cache", "adapter_cache_size": 0.01}
    return write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": f"s3://{loras}", **cache, **options})


@pytest.fixture
async def served(tmp_path: Path, loras: str) -> AsyncIterator[Served]:
    async with serving(source=config(tmp_path, loras)) as server:
        await until(lambda: listed(server, "far"))
        yield server


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


async def listed(served: Served, name: str) -> bool:
    cards = (await served.client.get("/v1/models")).json()["data"]
    return name in {card["id"] for card in cards}


async def ask(served: Served, model: str, path: str = "/v1/completions") -> httpx.Response:
    return await served.post(path, model=model, **GREEDY)


async def text(served: Served, model: str) -> str:
    return await served.text("/v1/completions", model=model, **GREEDY)


async def status(served: Served, model: str) -> int:
    return (await ask(served, model)).status_code


async def test_adapters_are_listed_and_loaded_when_they_are_named(
    served: Served, store: ObjectStore, loras: str, tmp_path: Path
) -> None:
    cards = {card["id"]: card for card in (await served.client.get("/v1/models")).json()["data"]}
    assert cards["far"]["root"] == f"s3://{loras}/far"
    assert (cards["far"]["parent"], "bad" in cards) == ("base", True)
    (local := tmp_path / "local").mkdir()
    write_lora_config(local, lora_options={"dynamic_lora_loading_path": str(tmp_path / "near")})
    async with serving(source=local / "config.json") as near:
        for name in ("far", "base:further"):
            assert await text(served, name) == await text(near, name)
    blend = await served.post("/v1/completions", model="base", lora=[{"alias": "far"}, {"alias": "sql"}], **GREEDY)
    assert blend.status_code == 200
    assert (await served.client.get("/v1/models/base:far")).json()["root"] == f"s3://{loras}/far"
    for stranger in ("nobody", "base:nobody", "plain:far", "base:../far", "sql/../far"):
        assert await status(served, stranger) == 404
    lines = (await served.client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['ovms_lora_downloads_total{result="ok"}'] == "2.0"
    assert float(values["ovms_lora_download_bytes_total"]) == float(
        sum(path.stat().st_size for path in (tmp_path / "near").rglob("*") if path.is_file())
    )
    assert float(values["ovms_lora_cache_bytes"]) > float(values["ovms_lora_download_bytes_total"])


async def test_concurrent_first_requests_get_each_object_once_and_hold_nobody_up(
    served: Served, store: ObjectStore, loras: str
) -> None:
    store.flowing.clear()
    with store.counted() as counts:
        cold = [asyncio.create_task(text(served, name)) for name in ("far", "base:far") * 25]
        await until(lambda: counted(store, loras))
        assert await text(served, "sql"), "warm ones are answered meanwhile"
        assert await status(served, "nobody") == 404
        store.flowing.set()
        assert len(set(await asyncio.gather(*cold))) == 1
    assert counts["GET", f"/{loras}/far/adapter_model.safetensors"] == 1
    assert counts["GET", f"/{loras}/far/adapter_config.json"] == 1


async def counted(store: ObjectStore, loras: str) -> bool:
    return ("GET", f"/{loras}/far/adapter_model.safetensors") in store.requests


async def test_a_bad_one_is_refused_for_its_requests_alone(served: Served) -> None:
    for name, code in (("bad", "adapter_config_invalid"), ("base:pickled", "adapter_format")):
        refused = await ask(served, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, code)
        refused = await ask(served, name, "/v3/completions")
        assert (refused.status_code, refused.json()["error"].startswith(OVMS_PREFIX)) == (400, True)
    assert await status(served, "far") == 200


async def test_a_change_is_followed_and_a_bad_change_is_not(
    served: Served, store: ObjectStore, loras: str, tmp_path: Path
) -> None:
    first = await text(served, "far")
    gate = served.models.runners["base"].gate
    gate.clear()
    running = asyncio.create_task(text(served, "far"))
    async with asyncio.timeout(10):
        while not served.state.lifecycle.active_calls:
            await asyncio.sleep(0.01)
    store.put(f"{loras}/far/adapter_config.json", b"{")
    store.upload(write_adapter(tmp_path / "new", config=good_config(lora_alpha=99)), f"{loras}/far")
    asyncio.get_running_loop().call_later(1, gate.set)
    assert await running == first, "one version from first to last token"
    await until(lambda: changed(served, first))
    second = await text(served, "far")
    store.put(f"{loras}/far/adapter_config.json", b"{")
    for _ in range(8):
        assert await text(served, "far") == second
        await asyncio.sleep(0.1)


async def changed(served: Served, before: str) -> bool:
    return await text(served, "far") != before


async def test_what_was_removed_is_listed_and_served_no_more(served: Served, store: ObjectStore, loras: str) -> None:
    for name in ("far", "further"):
        assert await status(served, name) == 200
        store.remove(f"{loras}/{name}")
    await until(lambda: gone(served, "far"))
    assert await status(served, "far") == 404
    async with asyncio.timeout(30):
        while await status(served, "further") != 404:
            await asyncio.sleep(0.05)


async def gone(served: Served, name: str) -> bool:
    return not await listed(served, name)


async def test_an_outage(served: Served, store: ObjectStore, loras: str, tmp_path: Path) -> None:
    far = await text(served, "far")
    store.down = True
    for _ in range(3):
        assert await text(served, "far") == far
    await until(lambda: outdated(served, "base:unknown"))
    for path in ("/v1/completions", "/v3/completions"):
        for name in ("further", "base:unknown"):
            refused = await ask(served, name, path)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1"), refused.text
            assert "cannot be read now; try again" in refused.text
            assert "testing" not in refused.text
    assert await listed(served, "further"), "the last listing stays"
    begun = time.monotonic()
    assert await text(served, "sql")
    async with serving(source=config(tmp_path, loras)) as restarted:
        assert await text(restarted, "far") == far, "from the local cache"
        assert await listed(restarted, "far")
    assert time.monotonic() - begun < 20
    store.heal()
    async with asyncio.timeout(30):
        while await status(served, "further") != 200:
            await asyncio.sleep(0.1)


async def outdated(served: Served, name: str) -> bool:
    """Whether the listing before the outage is too old by now to say that a name is nobody's."""
    return await status(served, name) != 404


async def test_what_left_memory_and_the_cache_is_fetched_again(tmp_path: Path, store: ObjectStore, loras: str) -> None:
    size = sum(path.stat().st_size for path in (tmp_path / "near" / "far").iterdir())
    one_fits = (1.5 * size + 4096) / 1e9
    async with serving(source=config(tmp_path, loras, adapter_cache_size=one_fits, max_cpu_loras=1)) as served:
        far = await text(served, "far")
        for _ in range(2):
            assert await text(served, "further") != far
            assert await text(served, "far") == far


async def test_another_bucket_takes_the_place_of_the_one_before(
    tmp_path: Path, store: ObjectStore, loras: str, served: Served
) -> None:
    other = f"{store.bucket()}/loras"
    store.upload(write_adapters(tmp_path / "near", "other") / "other", f"{other}/other")
    assert await status(served, "far") == 200
    config(tmp_path, other)
    assert (await served.client.post("/v1/config/reload")).status_code == 201
    assert [await status(served, name) for name in ("far", "other", "sql")] == [404, 200, 200]
    assert len(served.models.engines) == 2, "the base stayed"


async def test_check_reads_buckets(
    tmp_path: Path, store: ObjectStore, loras: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(address: str) -> tuple[int, str]:
        code = cli.main(["check", address])
        out, err = capsys.readouterr()
        return code, out + err

    code, said = await asyncio.to_thread(check, f"s3://{loras}/far")
    assert (code, said.startswith("adapter of rank 2 for")) == (0, True)
    code, said = await asyncio.to_thread(check, f"s3://{loras}/bad")
    assert (code, "adapter_config.json" in said) == (1, True)
    code, said = await asyncio.to_thread(check, f"s3://{loras}/nothing")
    assert (code, "there is no adapter at" in said) == (1, True)
    code, said = await asyncio.to_thread(check, "s3://key:secret@bucket/sql")
    assert (code, "credentials" in said, "secret@" in said) == (1, True, False)
