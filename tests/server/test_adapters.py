"""Choosing adapters per request: names, strengths, blends, cards, metrics, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.server.errors import OVMS_NOT_FOUND, OVMS_PREFIX
from tests.server.serving import Served, serving, write_adapters, write_lora_config
from tests.server.test_models import config, reload, status

pytestmark = pytest.mark.anyio

PATHS = ["/v3/completions", "/v1/completions"]
CHATS = ["/v3/chat/completions", "/v1/chat/completions"]
GREEDY = {"prompt": "hello", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server of `plain` and of `base` with sql, tools, mix and a loading path that holds more."""
    folder = tmp_path_factory.mktemp("served")
    path = write_lora_config(folder, lora_options={"dynamic_lora_loading_path": "found"})
    write_adapters(folder / "found", "later", "once", "listed", "plain", "two words")
    (folder / "found" / "empty").mkdir()
    (folder / "found" / "bad").mkdir()
    (folder / "found" / "bad" / "adapter_config.json").write_text("{")
    async with serving(source=path) as served:
        yield served


async def text(served: Served, path: str, model: str, **body: Any) -> str:
    return await served.text(path, model=model, **GREEDY, **body)


@pytest.mark.parametrize("path", PATHS)
async def test_names_select_adapters(adapted: Served, path: str) -> None:
    names = ["base", "sql", "tools", "mix", "later"]
    texts = await asyncio.gather(*(text(adapted, path, name) for name in names))
    assert len(set(texts)) == len(names)
    for name, expected in zip(names[1:], texts[1:], strict=True):
        assert await text(adapted, path, f"base:{name}") == expected
        assert await text(adapted, path, name, stream=True) == expected
    answer = await adapted.post(path, model="base:sql", **GREEDY)
    assert answer.json()["model"] == "base:sql"


@pytest.mark.parametrize(
    "model",
    [
        "base:",
        ":sql",
        "plain:sql",
        "base:plain",
        "base:base",
        "base:sql:tools",
        "SQL",
        "base:../loras/sql",
        "empty",
        "../found/later",
    ],
)
async def test_other_names_are_unknown(adapted: Served, model: str) -> None:
    v3 = await adapted.post("/v3/completions", model=model, **GREEDY)
    assert (v3.status_code, v3.json()) == (404, {"error": OVMS_NOT_FOUND})
    v1 = await adapted.post("/v1/completions", model=model, **GREEDY)
    assert (v1.status_code, v1.json()["error"]["param"]) == (404, "model")
    assert v1.json()["error"]["message"] == f"The model `{model}` does not exist."


@pytest.mark.parametrize("path", PATHS)
async def test_strengths(adapted: Served, path: str) -> None:
    mix = await text(adapted, path, "mix")
    assert await text(adapted, path, "mix", lora_alphas={}) == mix
    assert await text(adapted, path, "mix", lora_alphas={"sql": 0.7}) == mix
    assert await text(adapted, path, "mix", lora_alphas={"tools": 2}) == mix
    assert await text(adapted, path, "mix", lora_alphas={"sql": 0.9}) != mix
    assert await text(adapted, path, "sql", lora_alphas={"sql": 1.0}) == await text(adapted, path, "sql")
    assert await text(adapted, path, "sql", lora_alphas={"sql": 0.5}) != await text(adapted, path, "sql")
    assert await text(adapted, path, "base", lora_alphas={"whatever": 3}) == await text(adapted, path, "base")


@pytest.mark.parametrize("path", PATHS)
async def test_blends(adapted: Served, path: str) -> None:
    mix = await text(adapted, path, "mix")
    parts = [{"alias": "sql", "alpha": 0.7}, {"alias": "tools"}]
    assert await text(adapted, path, "base", lora=parts) == mix
    assert await text(adapted, path, "base", lora=[]) == await text(adapted, path, "base")
    assert await text(adapted, path, "base", lora=None) == await text(adapted, path, "base")
    assert await text(adapted, path, "base", lora=[{"alias": "once"}], stream=True) == await text(adapted, path, "once")


REFUSALS = [
    ("mix", {"lora_alphas": 1}, "lora_alphas must be an object"),
    ("mix", {"lora_alphas": []}, "lora_alphas must be an object"),
    ("mix", {"lora_alphas": {"sql": "1"}}, "lora_alphas value for 'sql' must be a number"),
    ("mix", {"lora_alphas": {"sql": None}}, "lora_alphas value for 'sql' must be a number"),
    ("mix", {"lora_alphas": {"sql": True}}, "lora_alphas value for 'sql' must be a number"),
    ("mix", {"lora_alphas": {"sql": 1000.1}}, "lora_alphas value for 'sql' out of range(-1000.0, 1000.0)"),
    ("mix", {"lora_alphas": {"sql": 1e300}}, "lora_alphas value for 'sql' out of range(-1000.0, 1000.0)"),
    ("sql", {"lora_alphas": {"sql": -(10**400)}}, "lora_alphas value for 'sql' out of range(-1000.0, 1000.0)"),
    ("mix", {"lora_alphas": {"x": 1}}, "lora_alphas key 'x' is not part of composite 'mix'"),
    ("sql", {"lora_alphas": {"tools": 1}}, "lora_alphas key 'tools' not allowed when targeting adapter 'sql'"),
    ("base:sql", {"lora_alphas": {"x": 1}}, "lora_alphas key 'x' not allowed when targeting adapter 'sql'"),
    ("plain", {"lora_alphas": {}}, "lora_alphas is not supported when no dynamic LoRA adapters are available."),
    ("plain", {"lora": []}, "lora is not supported when no dynamic LoRA adapters are available."),
    ("sql", {"lora": [{"alias": "tools"}]}, "lora needs the base in model: 'base', not an adapter"),
    ("base", {"lora": {}}, "lora must be an array"),
    ("base", {"lora": ["sql"]}, "lora must hold objects with an alias"),
    ("base", {"lora": [{"alias": 1}]}, "lora must hold objects with an alias"),
    ("base", {"lora": [{"alias": "sql", "weight": 1}]}, "lora must hold objects of alias and alpha only"),
    ("base", {"lora": [{"alias": "sql", "alpha": "1"}]}, "lora alpha for 'sql' must be a number"),
    (
        "base",
        {"lora": [{"alias": "sql", "alpha": -1e39}]},
        "lora alpha for 'sql' out of range(-1000.0, 1000.0)",
    ),
    (
        "base",
        {"lora": [{"alias": "sql", "alpha": 2**70}]},
        "lora alpha for 'sql' out of range(-1000.0, 1000.0)",
    ),
    ("base", {"lora": [{"alias": "sql"}, {"alias": "sql"}]}, "lora names an adapter twice"),
    ("base", {"lora": [{"alias": "sql"}] * 65}, "lora must have no more than 64 adapters"),
]


@pytest.mark.parametrize(("model", "fields", "message"), REFUSALS)
@pytest.mark.parametrize("path", [*PATHS, *CHATS])
async def test_refusals(adapted: Served, path: str, model: str, fields: dict[str, Any], message: str) -> None:
    prompt = {"messages": [{"role": "user"}]} if "chat" in path else {"prompt": "hi"}
    response = await adapted.post(path, model=model, max_tokens=1, **prompt, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    if path.startswith("/v3"):
        assert error == OVMS_PREFIX + message
    else:
        assert (error["message"], error["param"]) == (message, next(iter(fields)))


@pytest.mark.parametrize("path", [*PATHS, *CHATS])
@pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1e300", b"9" * 400])
@pytest.mark.parametrize("field", [b'"lora_alphas": {"sql": %s}', b'"lora": [{"alias": "sql", "alpha": %s}]'])
async def test_numbers_that_no_float_holds(adapted: Served, path: str, number: bytes, field: bytes) -> None:
    prompt = b'"messages": [{"role": "user"}]' if "chat" in path else b'"prompt": "hi"'
    body = b'{"model": "base", ' + prompt + b", " + field % number + b"}"
    response = await adapted.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "out of range(-1000.0, 1000.0)" in response.text


@pytest.mark.parametrize("path", PATHS)
async def test_the_strongest_are_answered(adapted: Served, path: str) -> None:
    for alpha in (1000, -1000.0, 0):
        assert await text(adapted, path, "sql", lora_alphas={"sql": alpha})


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_alias_in_a_blend_is_not_found(adapted: Served, path: str) -> None:
    for alias in ("nope", "mix", "base", "../loras/sql", ""):
        response = await adapted.post(path, model="base", lora=[{"alias": alias}], **GREEDY)
        assert response.status_code == 404, alias


@pytest.mark.parametrize("model", ["bad", "base:bad"])
async def test_a_bad_adapter_on_the_loading_path(adapted: Served, model: str) -> None:
    v1 = await adapted.post("/v1/completions", model=model, **GREEDY)
    assert (v1.status_code, v1.json()["error"]["code"]) == (422, "adapter_config_invalid")
    v3 = await adapted.post("/v3/completions", model=model, **GREEDY, stream=True)
    assert (v3.status_code, v3.json()["error"].startswith(OVMS_PREFIX)) == (400, True)
    assert await text(adapted, "/v1/completions", "sql")


async def test_tokenize_takes_aliases(adapted: Served) -> None:
    for path, field in (("/v3/tokenize", "text"), ("/v1/tokenize", "prompt")):
        answer = await adapted.post(path, model="base:sql", **{field: "hi"})
        assert answer.json()["tokens"] == [104, 105]


async def test_cards(adapted: Served) -> None:
    v1 = (await adapted.client.get("/v1/models")).json()["data"]
    ids = [card["id"] for card in v1]
    assert ids[:4] == ["plain", "base", "sql", "tools"]
    assert {"mix", "later", "once", "listed", "bad"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert not {"empty", "two words"} & set(ids)
    sql = v1[2]
    assert (sql["parent"], Path(sql["root"]).parts[-2:]) == ("base", ("loras", "sql"))
    assert v1[1]["parent"] is None
    v3 = (await adapted.client.get("/v3/models")).json()["data"]
    assert [card["id"] for card in v3] == ids
    assert set(v3[0]) == {"id", "object", "created", "owned_by"}
    assert v3[2]["parent"] == "base"
    for name in ("sql", "base:sql", "mix", "base:mix", "listed", "base:listed"):
        for version in ("v1", "v3"):
            card = (await adapted.client.get(f"/{version}/models/{name}")).json()
            assert (card["id"], card["parent"]) == (name.rpartition(":")[2], "base")
    for name in ("plain:sql", "empty", "base:", "base:base", "base:plain"):
        assert (await adapted.client.get(f"/v1/models/{name}")).status_code == 404


async def test_metrics(adapted: Served) -> None:
    await text(adapted, "/v1/completions", "sql")
    await adapted.post("/v1/completions", model="nobody", **GREEDY)
    await adapted.post("/v1/completions", model="base", lora=[{"alias": "stranger"}], **GREEDY)
    await adapted.post("/v1/completions", model="bad", **GREEDY)
    lines = (await adapted.client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['ovms_lora_requests_total{adapter="sql"}']) >= 1
    assert float(values['ovms_lora_tokens_total{adapter="sql",kind="prompt"}']) >= 5
    assert float(values['ovms_lora_tokens_total{adapter="sql",kind="generation"}']) >= 12
    assert values['ovms_lora_resident{adapter="sql"}'] == "1.0"
    assert float(values['ovms_lora_brought_in_total{model_name="base"}']) >= 1
    assert float(values['ovms_lora_loads_total{adapter="_other",result="error"}']) >= 1
    assert "ovms_lora_load_seconds_count" in values
    assert any(line.startswith('vllm:lora_requests_info{max_lora="8",running_lora_adapters=""') for line in values)
    assert not any(name in line for line in lines for name in ("nobody", "stranger"))


async def test_metrics_show_who_runs_and_waits(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        gate = served.models.runners["base"].gate
        gate.clear()
        running = asyncio.create_task(text(served, "/v1/completions", "mix"))
        async with asyncio.timeout(5):
            while 'waiting_lora_adapters="mix"' not in (await served.client.get("/metrics")).text:
                await asyncio.sleep(0.01)
        gate.set()
        await running
        assert 'running_lora_adapters="",waiting_lora_adapters=""' in (await served.client.get("/metrics")).text


async def test_a_failed_adapter_leaves_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ovms_lora")
    path = write_lora_config(tmp_path)
    (tmp_path / "loras" / "tools" / "adapter_config.json").write_text("{")
    async with serving(source=path) as served:
        assert not served.failures
        states = await config(served)
        assert states["plain"] == states["base"] == status("AVAILABLE")
        failed = states["tools"]["model_version_status"][0]
        assert (failed["state"], failed["status"]["error_code"]) == ("LOADING", "FAILED_PRECONDITION")
        assert failed["status"]["error_message"] in caplog.text
        assert "loaded: sql, mix" in caplog.text
        assert "sql" not in states
        assert await text(served, "/v3/completions", "sql")
        for name in ("tools", "base:tools", "mix"):
            refused = await served.post("/v1/completions", model=name, **GREEDY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_config_invalid")
        write_adapters(tmp_path / "loras", "tools")
        assert (await reload(served))[0] == 201
        assert "tools" not in await config(served)
        assert await text(served, "/v3/completions", "mix")


async def test_a_missing_adapter_is_not_found(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path, composite_lora_adapters=None, lora_adapters=[{"alias": "sql", "path": "nope"}])
    async with serving(source=path) as served:
        assert "No adapter found" in json.dumps((await config(served))["sql"])
        assert (await served.post("/v1/completions", model="sql", **GREEDY)).status_code == 404


async def test_a_reload_changes_adapters_and_keeps_the_base(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path)
    async with serving(source=path) as served:
        sql = await text(served, "/v3/completions", "sql")
        gate = served.models.runners["base"].gate
        gate.clear()
        running = asyncio.create_task(text(served, "/v3/completions", "sql"))
        await asyncio.sleep(0.05)
        gate.set()
        write_adapters(tmp_path / "loras", "new")
        write_lora_config(tmp_path, lora_adapters=[{"alias": "new", "path": "loras/new"}], composite_lora_adapters=None)
        assert (await reload(served))[0] == 201
        assert await running == sql
        assert len(served.models.engines) == 2
        assert (await served.post("/v3/completions", model="sql", **GREEDY)).status_code == 404
        assert await text(served, "/v3/completions", "new") != sql
        assert (await reload(served))[0] == 200
        write_adapters(tmp_path / "other", "else")
        (tmp_path / "other" / "else").rename(tmp_path / "loras" / "else")
        before = await text(served, "/v3/completions", "new")
        (tmp_path / "loras" / "else" / "adapter_config.json").replace(
            tmp_path / "loras" / "new" / "adapter_config.json"
        )
        assert (await reload(served))[0] == 201
        assert await text(served, "/v3/completions", "new") != before
        assert len(served.models.engines) == 2


@pytest.mark.parametrize("options", [{"max_loras": 2}, {"max_lora_rank": 8}, {"lora_dtype": "f32"}])
async def test_options_of_the_graph_reload_the_base(tmp_path: Path, options: dict[str, Any]) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        write_lora_config(tmp_path, lora_options=options)
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 3
        assert await text(served, "/v3/completions", "sql")


async def test_options_of_the_runtime_do_not(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        write_lora_config(tmp_path, lora_options={"pinned": ["sql"]})
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 2


@pytest.mark.parametrize("new_base", [False, True])
async def test_a_bad_adapter_rejects_a_reload_whole(tmp_path: Path, new_base: bool) -> None:
    path = write_lora_config(tmp_path)
    async with serving(source=path) as served:
        before = await text(served, "/v3/completions", "mix")
        entry = {"lora_adapters": [{"alias": "sql", "path": "loras/sql"}, {"alias": "x", "path": "loras/nope"}]}
        write_lora_config(tmp_path, composite_lora_adapters=None, **entry, **({"base_path": "b2"} if new_base else {}))
        code, answer = await reload(served)
        assert code == 412
        assert answer["error"].startswith("Reloading config file failed. ")
        assert "No adapter found" in answer["error"]
        assert await text(served, "/v3/completions", "mix") == before
        assert [card["id"] for card in (await served.client.get("/v3/models")).json()["data"]] == [
            *("plain", "base", "sql", "tools", "mix")
        ]


async def test_while_the_base_loads_its_aliases_are_not_unknown(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path, base_path="broken")
    async with serving(source=path) as served:
        for name in ("base", "sql", "base:sql", "mix"):
            assert (await served.post("/v3/completions", model=name, **GREEDY)).status_code == 503
