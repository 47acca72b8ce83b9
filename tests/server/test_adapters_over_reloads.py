"""Adapters that clients have loaded live through reloads of the configuration, as far as they still fit."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.server.state import ServerState
from tests.server.serving import Served, serving, write_adapters, write_lora_config
from tests.server.test_adapter_updates import load, options, unload
from tests.server.test_models import config, reload

pytestmark = pytest.mark.anyio

GREEDY: dict[str, Any] = {"prompt": "hello", "temperature": 0, "max_tokens": 12}
SQL = [{"alias": "sql", "path": "loras/sql"}]


async def text(served: Served, model: str) -> str:
    return await served.text("/v1/completions", model=model, **GREEDY)


async def status(served: Served, model: str) -> int:
    return (await served.post("/v1/completions", model=model, **GREEDY)).status_code


async def test_a_reload_that_keeps_the_base_keeps_them(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        await load(served, "x", write_adapters(tmp_path / "loras", "x") / "x")
        before = await text(served, "x")
        write_lora_config(tmp_path, lora_adapters=SQL, composite_lora_adapters=None)
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 2
        assert await text(served, "x") == before
        assert [await status(served, name) for name in ("sql", "tools", "mix")] == [200, 404, 404]
        assert await unload(served, "x") == (200, "Success: LoRA adapter 'x' removed successfully.")


async def test_a_base_that_is_loaded_anew_gets_them_again(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        await load(served, "x", write_adapters(tmp_path / "loras", "x") / "x", pinned=True)
        before = await text(served, "x")
        write_lora_config(tmp_path, lora_options={"max_loras": 3})
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 3
        assert await text(served, "x") == before


async def test_what_does_not_fit_the_new_base_is_logged_and_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        folder = write_adapters(tmp_path / "loras", "x") / "x"
        await load(served, "x", folder)
        shutil.rmtree(folder)
        write_lora_config(tmp_path, lora_options={"max_loras": 3})
        assert (await reload(served))[0] == 201
        assert "adapter x of model base does not fit any more" in caplog.text
        assert [await status(served, name) for name in ("x", "sql")] == [404, 200]


async def test_a_removal_by_reload_disturbs_no_running_request(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        before = await text(served, "mix")
        gate = served.models.runners["base"].gate
        gate.clear()
        running = asyncio.create_task(text(served, "mix"))
        async with asyncio.timeout(5):
            while not served.state.lifecycle.active_calls:
                await asyncio.sleep(0.002)
        write_lora_config(tmp_path, lora_adapters=SQL, composite_lora_adapters=None)
        reloading = asyncio.create_task(reload(served))
        await asyncio.sleep(0.02)
        gate.set()
        assert (await reloading)[0] == 201
        assert await running == before
        assert await status(served, "mix") == 404


async def test_a_base_that_is_replaced_waits_for_a_call_that_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, go_on, uses = asyncio.Event(), asyncio.Event(), ServerState.uses

    async def wait(state: ServerState, *args: Any) -> Any:
        prepared.set()
        await go_on.wait()
        return await uses(state, *args)

    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        before = await text(served, "sql")
        monkeypatch.setattr(ServerState, "uses", wait)
        running = asyncio.create_task(text(served, "sql"))
        await prepared.wait()
        write_lora_config(tmp_path, lora_options={"max_loras": 3})
        assert (await reload(served))[0] == 201
        assert served.state.lifecycle.active_calls == 1, "a drain would wait for it, too"
        await asyncio.sleep(0.2)  # in which an engine that nobody needs is stopped
        go_on.set()
        assert await running == before
        await served.settled()
        assert served.state.lifecycle.active_calls == 0


async def test_a_version_that_a_client_has_put_in_place_stays_until_its_entry_changes(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        configured = await text(served, "sql")
        await load(served, "sql", write_adapters(tmp_path / "loras", "x") / "x", load_inplace=True)
        replaced = await text(served, "sql")
        assert replaced != configured
        write_lora_config(tmp_path, lora_adapters=SQL, composite_lora_adapters=None)
        await reload(served)
        assert await text(served, "sql") == replaced
        write_lora_config(tmp_path, lora_adapters=[{**SQL[0], "alpha": 2.0}], composite_lora_adapters=None)
        await reload(served)
        assert await text(served, "sql") not in (configured, replaced)


async def test_a_configured_alias_takes_the_place_of_a_loaded_one(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        await load(served, "x", write_adapters(tmp_path / "loras", "x") / "x")
        x = await text(served, "x")
        write_lora_config(
            tmp_path, lora_adapters=[*SQL, {"alias": "x", "path": "loras/tools"}], composite_lora_adapters=None
        )
        assert (await reload(served))[0] == 201
        assert await text(served, "x") != x


async def test_a_composite_cannot_take_the_name_of_a_loaded_adapter(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path), options=options(tmp_path)) as served:
        await load(served, "x", write_adapters(tmp_path / "loras", "x") / "x")
        x = await text(served, "x")
        composite = {"alias": "x", "components": [{"adapter_alias": "sql"}]}
        write_lora_config(tmp_path, composite_lora_adapters=[composite])
        code, answer = await reload(served)
        assert (code, "the name 'x' is that of an adapter" in answer["error"]) == (412, True)
        assert await text(served, "x") == x


async def test_another_loading_path_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    write_adapters(tmp_path / "one", "here")
    write_adapters(tmp_path / "two", "there")
    path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "one"})
    async with serving(source=path, options=options(tmp_path)) as served:
        assert [await status(served, name) for name in ("here", "there")] == [200, 404]
        write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "two"})
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 2
        assert [await status(served, name) for name in ("here", "there")] == [404, 200]


async def test_a_failure_is_forgotten_once_the_alias_was_loaded(tmp_path: Path) -> None:
    path = write_lora_config(tmp_path, composite_lora_adapters=None)
    shutil.rmtree(tmp_path / "loras" / "sql")
    async with serving(source=path, options=options(tmp_path)) as served:
        assert (await config(served))["sql"]["model_version_status"][0]["status"]["error_code"] == "FAILED_PRECONDITION"
        assert (await load(served, "sql", tmp_path / "loras" / "tools"))[0] == 200
        assert "sql" not in await config(served)
        assert (await unload(served, "sql"))[0] == 200
        assert "sql" not in await config(served)
        assert await status(served, "sql") == 404


async def test_a_bad_adapter_of_a_base_that_stays_is_named(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        folder = write_adapters(tmp_path / "loras", "bad") / "bad"
        (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04" + bytes(100))
        write_lora_config(
            tmp_path, lora_adapters=[*SQL, {"alias": "bad", "path": "loras/bad"}], composite_lora_adapters=None
        )
        code, answer = await reload(served)
        assert code == 412
        assert answer["error"].startswith(
            "Reloading config file failed. adapter 'bad': adapter_model.safetensors is a Py"
        )
        assert [await status(served, name) for name in ("sql", "mix", "bad")] == [200, 200, 404]


async def test_credentials_in_a_loading_path_are_refused_with_its_place(tmp_path: Path) -> None:
    async with serving(source=write_lora_config(tmp_path)) as served:
        path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "s3://key:secret@bucket/loras"})
        code, answer = await reload(served)
        place = f"{path}: lora_options.dynamic_lora_loading_path of 'base'"
        assert (code, answer["error"].startswith(f"Reloading config file failed. {place}: ")) == (412, True)
        assert "secret" not in answer["error"]


async def test_who_is_still_looked_for_when_a_drain_begins_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(tmp_path / "found", "later")
    path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "found"})
    async with serving(source=path) as served:

        async def find_at_last(*_: Any) -> bool:
            served.state.lifecycle.draining = True
            return True

        monkeypatch.setattr("ovms_lora.server.state.is_found", find_at_last)
        assert await status(served, "later") == 503
