"""Tenants: what each may use and see, and that they share neither prefixes nor the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ovms_lora.core.config import EngineOptions
from ovms_lora.server.keys import ApiKey, digest_of, plain_keys
from ovms_lora.server.options import ServerOptions
from ovms_lora.server.tenants import PUBLIC, Tenant
from tests.server.serving import FakeModels, Served, serving, write_adapters, write_lora_config

pytestmark = pytest.mark.anyio

RIGHTS = {
    "all": None,
    "base": frozenset({"base"}),
    "sql": frozenset({"sql"}),
    "mixed": frozenset({"base", "sql", "mix"}),
    "pattern": frozenset({"base:*"}),
    "exact": frozenset({"base:sql", "ghost"}),
}


def tenant_keys(**shares: float) -> tuple[ApiKey, ...]:
    return tuple(ApiKey(digest_of(name), Tenant(name, names, shares.get(name, 1.0))) for name, names in RIGHTS.items())


def as_tenant(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


async def ask(served: Served, tenant: str, model: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    body = {"model": model, "prompt": "hi", "text": "hi", "max_tokens": 1, **body}
    return await served.client.post(path, json=body, headers=as_tenant(tenant))


@pytest.fixture(scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("shop")
    path = write_lora_config(folder, lora_options={"dynamic_lora_loading_path": "dynamic"})
    write_adapters(folder / "dynamic", "found")
    options = ServerOptions(
        poll_seconds=0, api_keys=(*tenant_keys(), *plain_keys("plain")), admin_keys=plain_keys("admin")
    )
    async with serving(source=path, options=options) as served:
        yield served


@pytest.mark.parametrize(
    ("tenant", "open_names", "closed_names"),
    [
        ("all", ("plain", "base", "sql", "mix", "base:sql", "base:found"), ()),
        ("base", ("base",), ("plain", "sql", "mix", "base:sql", "found", "base:found")),
        ("sql", ("sql", "base:sql"), ("plain", "base", "tools", "mix", "base:mix")),
        ("mixed", ("base", "sql", "mix"), ("tools", "plain")),
        ("pattern", ("sql", "mix", "base:tools", "found"), ("base", "plain")),
        ("exact", ("base:sql", "sql"), ("base", "tools", "base:tools")),
        ("plain", ("plain", "base", "sql"), ()),
        ("admin", ("plain", "base", "sql"), ()),
    ],
)
async def test_who_may_use_what(
    shop: Served, tenant: str, open_names: tuple[str, ...], closed_names: tuple[str, ...]
) -> None:
    for path in ("/v1/completions", "/v3/completions", "/v3/tokenize", "/v1/tokenize"):
        for name in open_names:
            assert (await ask(shop, tenant, name, path)).status_code == 200, (path, name)
        for name in closed_names:
            response = await ask(shop, tenant, name, path)
            message = f"The key may not use the model `{name}`."
            shape: Any = message
            if path.startswith("/v1"):
                shape = {"message": message, "type": "PermissionDeniedError", "param": "model", "code": 403}
            assert (response.status_code, response.json()) == (403, {"error": shape}), (path, name)


async def test_names_of_others_are_neither_there_nor_not(shop: Served) -> None:
    for path in ("/v1/completions", "/v3/completions", "/v3/nope"):
        for name in ("plain", "no-such", "base:no-such", "no-such:sql", ""):
            assert (await ask(shop, "sql", name, path)).status_code == 403, (path, name)
        assert (await ask(shop, "all", "no-such", path)).status_code == 404
        assert (await ask(shop, "exact", "ghost", path)).status_code == 404


@pytest.mark.parametrize(
    ("tenant", "status"), [("all", 200), ("base", 403), ("mixed", 403), ("pattern", 403), ("plain", 200)]
)
async def test_every_adapter_of_a_blend_is_asked_for(shop: Served, tenant: str, status: int) -> None:
    blend = [{"alias": "sql"}, {"alias": "tools"}]
    for path in ("/v1/completions", "/v3/completions"):
        assert (await ask(shop, tenant, "base", path, lora=blend)).status_code == status
    assert (await ask(shop, "mixed", "base", lora=[{"alias": "sql"}])).status_code == 200
    assert (await ask(shop, "mixed", "base", lora=[{"alias": "no-such"}])).status_code == 403


@pytest.mark.parametrize(
    ("tenant", "names"),
    [
        ("all", {"plain", "base", "sql", "tools", "mix", "found"}),
        ("base", {"base"}),
        ("sql", {"sql"}),
        ("pattern", {"sql", "tools", "mix", "found"}),
        ("exact", {"sql"}),
        ("admin", {"plain", "base", "sql", "tools", "mix", "found"}),
    ],
)
async def test_lists_and_cards_show_only_what_may_be_used(shop: Served, tenant: str, names: set[str]) -> None:
    everything = {"plain", "base", "sql", "tools", "mix"}
    for prefix in ("/v1", "/v3"):
        listed = (await shop.client.get(f"{prefix}/models", headers=as_tenant(tenant))).json()["data"]
        assert {card["id"] for card in listed} == names
        for name in everything:
            response = await shop.client.get(f"{prefix}/models/{name}", headers=as_tenant(tenant))
            assert response.status_code == (200 if name in names else 404)
    for name in everything:
        for suffix in ("", "/ready", "/versions/1", "/versions/1/ready"):
            response = await shop.client.get(f"/v2/models/{name}{suffix}", headers=as_tenant(tenant))
            assert response.status_code == (200 if name in names else 404), (name, suffix)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/config"),
        ("POST", "/v1/config/reload"),
        ("GET", "/metrics"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("GET", "/"),
        ("GET", "/v1/nope"),
    ],
)
async def test_what_shows_or_changes_the_server_is_not_for_tenants(shop: Served, method: str, path: str) -> None:
    for tenant in ("all", "sql"):
        assert (await shop.client.request(method, path, headers=as_tenant(tenant))).status_code == 403
    assert (await shop.client.request(method, path, headers=as_tenant("admin"))).status_code not in (401, 403)


async def test_only_admins_reload(shop: Served) -> None:
    for key, status in (("plain", 403), ("wrong", 401), ("admin", 200)):
        response = await shop.client.post("/v1/config/reload", headers=as_tenant(key))
        assert response.status_code == status


async def test_without_admin_keys_a_plain_key_reloads_and_a_tenants_does_not(tmp_path: Path) -> None:
    options = ServerOptions(poll_seconds=0, api_keys=(*tenant_keys(), *plain_keys("plain")))
    async with serving(source=write_lora_config(tmp_path), options=options) as served:
        for key, status in (("plain", 200), ("all", 403)):
            assert (await served.client.post("/v1/config/reload", headers=as_tenant(key))).status_code == status


async def test_tenants_share_no_prefix_whatever_salts_they_give() -> None:
    keys = tuple(ApiKey(digest_of(name), Tenant(name)) for name in ("a", "b"))
    options = ServerOptions(poll_seconds=0, api_keys=(*keys, *plain_keys("plain")))
    models = FakeModels(options=EngineOptions(max_num_batched_tokens=64, enable_prefix_caching=True))

    async def cached(served: Served, key: str, salt: str | None = None) -> int:
        body = {"model": "m", "prompt": "a prompt of more than one block", "max_tokens": 1, "cache_salt": salt}
        answer = await served.client.post("/v1/completions", json=body, headers=as_tenant(key))
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    async with serving(models, options=options) as served:
        assert await cached(served, "a") == 0
        assert await cached(served, "a") > 0
        for key, salt in (("b", None), ("b", "a"), ("b", "a\0"), ("plain", None), ("plain", "a"), ("plain", "a\0")):
            assert await cached(served, key, salt) == 0, (key, salt)
        assert await cached(served, "b") > 0


def test_salts_of_different_owners_are_different() -> None:
    owners = (PUBLIC, Tenant("a"), Tenant("b"))
    salts = ("", "a", "b", "a\0", "\0", "a\0a")
    made = [owner.salt(salt) for owner in owners for salt in salts]
    assert len(set(made)) == len(made)
    assert PUBLIC.salt("") == ""


async def test_a_tenant_cannot_fill_the_queue() -> None:
    keys = tuple(ApiKey(digest_of(name), Tenant(name, None, 0.5)) for name in ("a", "b"))
    async with serving(FakeModels(max_waiting=8), options=ServerOptions(poll_seconds=0, api_keys=keys)) as served:
        gate, engine = served.models.runners["m"].gate, served.models.engines[0]
        gate.clear()
        try:
            running = asyncio.create_task(ask(served, "a", "m"))
            async with asyncio.timeout(5):
                while not engine.stats().running:
                    await asyncio.sleep(0.005)
                flood = [asyncio.create_task(ask(served, "a", "m")) for _ in range(20)]
                while sum(task.done() for task in flood) < 16:
                    await asyncio.sleep(0.005)
            other = [asyncio.create_task(ask(served, "b", "m")) for _ in range(3)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in other)
        finally:
            gate.set()
        answers = [await task for task in flood]
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 16
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
        assert [(await task).status_code for task in (running, *other)] == [200] * 4
