"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: statuses, messages, who may, from where, and at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.server.keys import plain_keys
from ovms_lora.server.options import ServerOptions
from tests.adapters.adapter_files import good_config, good_tensors, write_adapter
from tests.server.serving import Served, serving, write_adapters, write_lora_config
from tests.server.test_models import reload

pytestmark = pytest.mark.anyio

GREEDY: dict[str, Any] = {"prompt": "hello", "temperature": 0, "max_tokens": 12}
EXISTS = (
    "The lora adapter '{}' has already been loaded. "
    "If you want to load the adapter in place, set 'load_inplace' to True."
)


def options(folder: Path, **settings: Any) -> ServerOptions:
    return ServerOptions(poll_seconds=0, runtime_lora_updating=True, lora_path_prefixes=(folder,), **settings)


@pytest.fixture
async def open_to_updates(tmp_path: Path) -> AsyncIterator[Served]:
    path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "found"})
    async with serving(source=path, options=options(tmp_path / "loras")) as served:
        yield served


async def load(served: Served, name: str, path: Path | str, **more: Any) -> tuple[int, str]:
    response = await served.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)
    return response.status_code, response.text if response.status_code == 200 else response.json()["error"]["message"]


async def unload(served: Served, name: str) -> tuple[int, str]:
    response = await served.post("/v1/unload_lora_adapter", lora_name=name)
    return response.status_code, response.text if response.status_code == 200 else response.json()["error"]["message"]


async def test_an_adapter_comes_and_goes(open_to_updates: Served, tmp_path: Path) -> None:
    served = open_to_updates
    folder = write_adapters(tmp_path / "loras", "x") / "x"
    assert await load(served, "x", folder) == (200, "Success: LoRA adapter 'x' added successfully.")
    assert await served.text("/v1/completions", model="x", **GREEDY) != await served.text(model="base", **GREEDY)
    card = (await served.client.get("/v1/models/base:x")).json()
    assert (card["id"], card["root"], card["parent"]) == ("x", str(folder), "base")
    assert await load(served, "x", folder) == (400, EXISTS.format("x"))
    metrics = (await served.client.get("/metrics")).text
    assert 'ovms_lora_loads_total{adapter="x",result="ok"} 1.0' in metrics
    assert await unload(served, "x") == (200, "Success: LoRA adapter 'x' removed successfully.")
    assert await unload(served, "x") == (404, "The lora adapter 'x' cannot be found.")
    assert (await served.post("/v1/completions", model="x", **GREEDY)).status_code == 404


async def test_in_place(open_to_updates: Served, tmp_path: Path) -> None:
    served = open_to_updates
    folder = write_adapters(tmp_path / "loras", "x") / "x"
    assert (await load(served, "x", folder, load_inplace=True))[0] == 200
    before = await served.text("/v1/completions", model="x", **GREEDY)
    gate = served.models.runners["base"].gate
    gate.clear()
    running = asyncio.create_task(served.text("/v1/completions", model="x", **GREEDY))
    async with asyncio.timeout(5):
        while not served.state.lifecycle.active_calls:
            await asyncio.sleep(0.002)
    write_adapter(folder, config=good_config(lora_alpha=99))
    swapping = asyncio.create_task(load(served, "x", folder, load_inplace=True, pinned=True))
    gate.set()
    assert (await swapping)[0] == 200
    assert await running == before
    assert await served.text("/v1/completions", model="x", **GREEDY) != before


async def test_a_running_request_keeps_what_is_unloaded(open_to_updates: Served, tmp_path: Path) -> None:
    served = open_to_updates
    await load(served, "x", write_adapters(tmp_path / "loras", "x") / "x")
    before = await served.text("/v1/completions", model="x", **GREEDY)
    gate = served.models.runners["base"].gate
    gate.clear()
    running = asyncio.create_task(served.text("/v1/completions", model="x", **GREEDY))
    async with asyncio.timeout(5):
        while not served.state.lifecycle.active_calls:
            await asyncio.sleep(0.002)
    leaving = asyncio.create_task(unload(served, "x"))
    gate.set()
    assert (await leaving)[0] == 200
    assert await running == before


@pytest.mark.parametrize(
    ("body", "status", "message", "param"),
    [
        ({}, 400, "Both 'lora_name' and 'lora_path' must be provided.", "lora_name"),
        ({"lora_name": "x"}, 400, "Both 'lora_name' and 'lora_path' must be provided.", "lora_path"),
        ({"lora_path": "x"}, 400, "Both 'lora_name' and 'lora_path' must be provided.", "lora_name"),
        ({"lora_name": "", "lora_path": "l"}, 400, "Both 'lora_name' and 'lora_path' must be provided.", "lora_name"),
        ({"lora_name": 1, "lora_path": "l"}, 400, "lora_name must be a string", "lora_name"),
        ({"lora_name": "x", "lora_path": []}, 400, "lora_path must be a string", "lora_path"),
        ({"lora_name": "x", "lora_path": "l", "pinned": 1}, 400, "pinned must be true or false", "pinned"),
        (
            {"lora_name": "x", "lora_path": "l", "load_inplace": "y"},
            400,
            "load_inplace must be true or false",
            "load_inplace",
        ),
        ({"lora_name": "a b", "lora_path": "l"}, 400, "adapter alias 'a b' is not valid", "lora_name"),
        ({"lora_name": "a/b", "lora_path": "l"}, 400, "adapter alias 'a/b' is not valid", "lora_name"),
        ({"lora_name": "text", "lora_path": "l"}, 400, "adapter alias 'text' is reserved", "lora_name"),
        ({"lora_name": "plain", "lora_path": "l"}, 400, "'plain' is the name of a model", "lora_name"),
        ({"lora_name": "base", "lora_path": "l"}, 400, "'base' is the name of a model", "lora_name"),
        ({"lora_name": "sql", "lora_path": "l"}, 400, EXISTS.format("sql"), "lora_name"),
        ({"lora_name": "mix", "lora_path": "l"}, 400, EXISTS.format("mix"), "lora_name"),
        ({"lora_name": "x", "lora_path": "l\x00"}, 400, "lora_path is not a path", "lora_path"),
        ({"lora_name": "x", "lora_path": "l", "base_model_name": "no"}, 404, "The model `no` does not exist.", "model"),
        (
            {"lora_name": "x", "lora_path": "l", "base_model_name": "plain"},
            400,
            "the model 'plain' takes no adapters",
            "base_model_name",
        ),
        ({"lora_name": "x", "lora_path": "/"}, 403, "lora_path is outside of the folders", None),
        ({"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path is outside of the folders", None),
        ({"lora_name": "x", "lora_path": "nope"}, 403, "lora_path is outside of the folders", None),
    ],
)
async def test_refused_loads(
    open_to_updates: Served, body: dict[str, Any], status: int, message: str, param: str | None
) -> None:
    response = await open_to_updates.post("/v1/load_lora_adapter", **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == param


@pytest.mark.parametrize("body", [{}, {"lora_name": ""}, {"lora_name": None}])
async def test_an_unload_needs_a_name(open_to_updates: Served, body: dict[str, Any]) -> None:
    response = await open_to_updates.post("/v1/unload_lora_adapter", **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."


async def test_what_cannot_be_unloaded(open_to_updates: Served) -> None:
    for name in ("base", "mix", "nope"):
        assert await unload(open_to_updates, name) == (404, f"The lora adapter '{name}' cannot be found.")
    assert await unload(open_to_updates, "sql") == (400, "adapter 'sql' is part of composite 'mix'")


async def test_paths(open_to_updates: Served, tmp_path: Path) -> None:
    served = open_to_updates
    outside = write_adapters(tmp_path / "outside", "x") / "x"
    loras = tmp_path / "loras"
    (loras / "link").symlink_to(outside)
    (tmp_path / "alias").symlink_to(loras / "sql")
    assert (await load(served, "x", outside))[0] == 403
    assert (await load(served, "x", loras / "link"))[0] == 403
    assert (await load(served, "x", loras / ".." / "outside" / "x"))[0] == 403
    assert (await load(served, "x", tmp_path / "lorasX"))[0] == 403
    missing = loras / "nope"
    assert await load(served, "x", missing) == (404, f"Loading lora x failed: No adapter found for {missing}")
    assert (await load(served, "x", tmp_path / "alias"))[0] == 200
    assert (await load(served, "y", write_adapters(tmp_path / "found", "y") / "y"))[0] == 200
    metrics = (await served.client.get("/metrics")).text
    assert 'ovms_lora_loads_total{adapter="_other",result="error"} 1.0' in metrics


BAD: list[tuple[str, dict[str, Any]]] = [
    ("adapter_config_invalid", {"config": b"{"}),
    ("adapter_unsupported", {"config": good_config(use_dora=True)}),
    ("adapter_truncated", {"weights": b""}),
    ("adapter_format", {"weights": b"PK\x03\x04" + bytes(64)}),
    ("adapter_incomplete", {"tensors": dict(list(good_tensors().items())[:-2])}),
    ("adapter_rank", {"config": good_config(r=65), "tensors": good_tensors(rank=65)}),
    ("adapter_nonfinite", {"tensors": {name: array * float("nan") for name, array in good_tensors().items()}}),
]


@pytest.mark.parametrize(("code", "files"), BAD, ids=[code for code, _ in BAD])
async def test_bad_adapters(open_to_updates: Served, tmp_path: Path, code: str, files: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "loras" / "x", **files)
    response = await open_to_updates.post("/v1/load_lora_adapter", lora_name="x", lora_path=str(folder))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (422, code, "UnprocessableEntityError")
    if code == "adapter_rank":
        assert error["message"] == "LoRA rank 65 is greater than max_lora_rank 64."
    assert (await open_to_updates.post("/v1/completions", model="x", **GREEDY)).status_code == 404


async def test_a_folder_without_a_configuration(open_to_updates: Served, tmp_path: Path) -> None:
    (tmp_path / "loras" / "x").mkdir()
    body = {"lora_name": "x", "lora_path": str(tmp_path / "loras" / "x")}
    response = await open_to_updates.post("/v1/load_lora_adapter", **body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_config_missing")


async def test_fifty_loads_of_one_alias_are_one(open_to_updates: Served, tmp_path: Path) -> None:
    folder = write_adapters(tmp_path / "loras", "x") / "x"
    answers = await asyncio.gather(*(load(open_to_updates, "x", folder) for _ in range(50)))
    assert sorted(status for status, _ in answers) == [200] + [400] * 49
    assert {message for status, message in answers if status == 400} == {EXISTS.format("x")}


async def test_loads_and_requests_at_once(open_to_updates: Served, tmp_path: Path) -> None:
    served, names = open_to_updates, [f"a{number}" for number in range(12)]
    write_adapters(tmp_path / "loras", *names)
    loads = [load(served, name, tmp_path / "loras" / name) for name in names]
    asks = [served.text("/v1/completions", model="sql", **GREEDY) for _ in names]
    results = await asyncio.gather(*loads, *asks)
    assert {result[0] for result in results[: len(names)]} == {200}
    texts = await asyncio.gather(*(served.text("/v1/completions", model=name, **GREEDY) for name in names))
    assert len(set(texts)) == len(names)
    assert {status for status, _ in await asyncio.gather(*(unload(served, name) for name in names))} == {200}


async def test_on_demand_loads_at_once_are_one(open_to_updates: Served, tmp_path: Path) -> None:
    write_adapters(tmp_path / "found", "y")
    texts = await asyncio.gather(*(open_to_updates.text(model="y", **GREEDY) for _ in range(30)))
    assert len(set(texts)) == 1


async def test_updates_are_off_by_default(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            response = await served.post(path, lora_name="x", lora_path=str(tmp_path / "loras" / "sql"))
            assert (response.status_code, response.json()["error"]["type"]) == (404, "NotFoundError")


async def test_without_prefixes_only_the_loading_path_is_allowed(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "found"})
    write_adapters(tmp_path / "found", "y")
    async with serving(source=path, options=ServerOptions(poll_seconds=0, runtime_lora_updating=True)) as served:
        assert (await load(served, "x", tmp_path / "loras" / "sql"))[0] == 403
        assert (await load(served, "x", tmp_path / "found" / "y"))[0] == 200


@pytest.mark.parametrize(
    ("keys", "given", "path", "expected"),
    [
        ((), None, "/v1/load_lora_adapter", 401),
        ((), "admin", "/v1/load_lora_adapter", 400),
        ((), None, "/v1/models", 200),
        (("client",), "client", "/v1/unload_lora_adapter", 403),
        (("client",), "wrong", "/v1/unload_lora_adapter", 401),
        (("client",), "admin", "/v1/unload_lora_adapter", 400),
        (("client",), "admin", "/v1/models", 200),
        (("client",), "client", "/v1/models", 200),
        (("client",), None, "/v1/models", 401),
    ],
)
async def test_admin_keys(tmp_path: Path, keys: tuple[str, ...], given: str | None, path: str, expected: int) -> None:
    settings = options(tmp_path, api_keys=plain_keys(*keys), admin_keys=plain_keys("admin"))
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    async with serving(options=settings) as served:
        method = "GET" if path.endswith("models") else "POST"
        content = None if method == "GET" else "{}"
        headers["Content-Type"] = "application/json"
        response = await served.client.request(method, path, headers=headers, content=content)
        assert response.status_code == expected, response.text


async def test_several_bases(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path)
    text = path.read_text().replace(
        '{"name": "plain", "base_path": "plain"}', '{"name": "plain", "base_path": "plain", "lora_options": {}}'
    )
    path.write_text(text)
    folder = write_adapters(tmp_path / "loras", "x") / "x"
    async with serving(source=path, options=options(tmp_path)) as served:
        status, message = await load(served, "x", folder)
        assert (status, message.startswith("base_model_name is needed")) == (400, True)
        assert (await load(served, "x", folder, base_model_name="plain"))[0] == 200
        assert await load(served, "x", folder, base_model_name="base", load_inplace=True) == (
            400,
            "'x' is an adapter of the model 'plain'",
        )
        assert (await load(served, "sql", folder, base_model_name="plain"))[0] == 400
        assert (await served.post("/v1/completions", model="plain:x", **GREEDY)).status_code == 200
        assert (await served.post("/v1/completions", model="base:x", **GREEDY)).status_code == 404
        path.write_text(
            text.replace('"alias": "sql"', '"alias": "x"').replace('"adapter_alias": "sql"', '"adapter_alias": "x"')
        )
        code, answer = await reload(served)
        assert (code, "is that of an adapter loaded for 'plain'" in answer["error"]) == (412, True)
        assert (await unload(served, "x"))[0] == 200
        assert (await reload(served))[0] == 201
        assert (await served.post("/v1/completions", model="base:x", **GREEDY)).status_code == 200


async def test_a_draining_server_changes_nothing(open_to_updates: Served, tmp_path: Path) -> None:
    open_to_updates.state.lifecycle.draining = True
    assert (await load(open_to_updates, "x", tmp_path / "loras" / "sql"))[0] == 503
    assert (await unload(open_to_updates, "sql"))[0] == 503
