"""Replicas that load adapters from a bucket: one download for all, through an outage, and a change that is followed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.object_store import ObjectStore
from tests.scale.fleet import COLD, Fleet, fleet_config, wait_for

FIRST, SECOND, OTHER, MISSING = COLD[:4]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bucket(fleet: Fleet, store: ObjectStore, tmp_path: Path) -> Iterator[str]:
    """The fleet with a loading path in a bucket, with two adapters; yield the place without the scheme."""
    place = f"{store.bucket()}/loras"
    repository = fleet.config.options.lora_path_prefixes[0]
    for alias in (FIRST, SECOND):
        store.upload(repository / "cold" / alias, f"{place}/{alias}")
    document = json.loads((repository / "config.json").read_text())
    entry = document["model_config_list"][0]["config"]
    for adapter in entry["lora_adapters"]:
        adapter["path"] = str(repository / adapter["path"])
    options = {"dynamic_lora_loading_path": f"s3://{place}", "adapter_cache_path": str(tmp_path / "cache")}
    entry["lora_options"].update(options)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    fleet.deploy(source=fleet_config(path).source)
    wait_for(lambda: len(fleet.resident()) == 2)
    yield place
    store.heal()
    fleet.deploy()
    wait_for(lambda: len(fleet.resident()) == 2)


def test_replicas_share_downloads_live_through_an_outage_and_follow_changes(
    fleet: Fleet, store: ObjectStore, bucket: str
) -> None:
    repository = fleet.config.options.lora_path_prefixes[0]
    with closing(fleet.client()) as client:
        listed = {model["id"] for model in client.get("/v1/models").json()["data"]}
    assert {FIRST, SECOND} <= listed and MISSING not in listed
    with store.counted() as counts:
        fleet.many(*[FIRST] * 24, at_once=24)
    assert len(fleet.served(FIRST)) == 2, "both replicas have had it"
    assert counts["GET", f"/{bucket}/{FIRST}/{WEIGHTS}"] == 1
    before = text(fleet, FIRST)
    assert fleet.complete(MISSING).status_code == 404

    store.down = True
    assert {fleet.complete(FIRST).status_code for _ in range(4)} == {200}
    refused = fleet.complete(SECOND)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    store.heal()
    wait_for(lambda: fleet.complete(SECOND).status_code == 200)

    store.put(f"{bucket}/{FIRST}/{WEIGHTS}", (repository / "cold" / OTHER / WEIGHTS).read_bytes())
    wait_for(lambda: text(fleet, FIRST) != before)

    store.put(f"{bucket}/{SECOND}/{WEIGHTS}", b"no weights")
    store.put(f"{bucket}/{MISSING}/adapter_config.json", b"{")
    store.put(f"{bucket}/{MISSING}/{WEIGHTS}", b"no weights")
    wait_for(lambda: fleet.complete(MISSING).status_code == 422)
    assert {fleet.complete(FIRST).status_code for _ in range(4)} == {200}


def text(fleet: Fleet, alias: str) -> str:
    answer: str = fleet.complete(alias, max_tokens=32).json()["choices"][0]["text"]
    return answer
