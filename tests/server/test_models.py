"""Several models, their states, and reloads of config.json."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.errors import ConfigError, ModelFolderError
from ovms_lora.server.options import ServerOptions
from tests.server.serving import FakeModels, Served, serving, write_config

pytestmark = pytest.mark.anyio

NOT_FOUND = {"error": "Mediapipe graph definition with requested name is not found"}


def status(state: str, code: str = "OK", message: str = "OK") -> dict[str, Any]:
    error = {"error_code": code, "error_message": message}
    return {"model_version_status": [{"version": "1", "state": state, "status": error}]}


async def config(served: Served) -> Any:
    return (await served.client.get("/v1/config")).json()


async def reload(served: Served) -> tuple[int, Any]:
    response = await served.client.post("/v1/config/reload")
    return response.status_code, response.json()


async def test_several_models_are_served(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "base_model", "org/merged")) as served:
        assert await config(served) == {"base_model": status("AVAILABLE"), "org/merged": status("AVAILABLE")}
        for name in ("base_model", "org/merged"):
            answer = (await served.post("/v3/completions", model=name, prompt="hi", max_tokens=1)).json()
            assert answer["model"] == name
            for path in (f"/v3/models/{name}", f"/v1/models/{name}"):
                assert (await served.client.get(path)).json()["id"] == name
            assert (await served.client.get(f"/v2/models/{name}/ready")).status_code == 200
            assert (await served.client.get(f"/v2/models/{name}")).json()["name"] == name
        listed = (await served.client.get("/v3/models")).json()["data"]
        assert [(card["id"], card["object"], card["owned_by"]) for card in listed] == [
            ("base_model", "model", "OVMS"),
            ("org/merged", "model", "OVMS"),
        ]
        missing = await served.post("/v1/completions", prompt="hi")
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("model", ["other", "", "m:sql", "M"])
async def test_unknown_models_are_not_found(served: Served, model: str) -> None:
    response = await served.post("/v3/completions", model=model, prompt="hi")
    assert (response.status_code, response.json()) == (404, NOT_FOUND)


async def test_unknown_models_have_no_card(served: Served) -> None:
    v3 = await served.client.get("/v3/models/x")
    assert (v3.status_code, v3.json()) == (404, {"error": "Model not found"})
    v1 = await served.client.get("/v1/models/x")
    assert (v1.status_code, v1.json()["error"]["param"]) == (404, "model")


async def test_at_start_the_rest_is_served(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "good", "broken")) as served:
        assert not served.failures
        assert await config(served) == {
            "good": status("AVAILABLE"),
            "broken": status("LOADING", "FAILED_PRECONDITION", "broken is not a model"),
        }
        assert await served.text("/v3/completions", model="good", prompt="hi", max_tokens=1)
        response = await served.post("/v3/completions", model="broken", prompt="hi")
        assert response.status_code == 503
        assert "retry-after" in response.headers
        assert (await served.client.get("/v2/health/ready")).status_code == 200
        assert (await served.client.get("/v2/models/broken/ready")).status_code == 503


async def test_without_any_model_the_server_fails(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "broken")) as served:
        assert [type(failure) for failure in served.failures] == [ModelFolderError]
        assert (await served.client.get("/v2/health/ready")).status_code == 503


async def test_a_broken_config_fails_at_start(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    async with serving(source=path) as served:
        assert [type(failure) for failure in served.failures] == [ConfigError]


async def test_while_models_load_probes_are_answered(tmp_path: Path) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(FakeModels):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return super().__call__(*arguments, **settings)

    async with serving(Slow(), source=write_config(tmp_path, "m"), wait=False) as served:
        await asyncio.sleep(0.05)
        assert (await served.client.get("/v2/health/live")).status_code == 200
        assert (await served.client.get("/v2/health/ready")).status_code == 503
        assert await config(served) == {"m": status("LOADING")}
        response = await served.post("/v3/completions", model="m", prompt="hi")
        assert response.status_code == 503
        assert response.json() == {"error": "Mediapipe graph definition with requested name is not loaded yet"}
        gate.set()
        async with asyncio.timeout(5):
            while (await served.client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)


async def test_reload_without_a_change_answers_200(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "a")) as served:
        assert await reload(served) == (200, {"a": status("AVAILABLE")})
        assert len(served.models.engines) == 1


async def test_reload_adds_and_removes(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "a", "b")) as served:
        write_config(tmp_path, "b", "c")
        code, statuses = await reload(served)
        assert code == 201
        assert statuses["b"] == statuses["c"] == status("AVAILABLE")
        assert len(served.models.engines) == 3
        gone = await served.post("/v3/completions", model="a", prompt="hi")
        assert (gone.status_code, gone.json()) == (404, NOT_FOUND)
        async with asyncio.timeout(5):
            while (await config(served))["a"] != status("END"):
                await asyncio.sleep(0.01)
        assert await reload(served) == (200, await config(served))


async def test_a_removed_model_finishes_what_runs(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "a", "b")) as served:
        gate = served.models.runners["a"].gate
        gate.clear()
        running = asyncio.create_task(served.post("/v3/completions", model="a", prompt="hi", max_tokens=5))
        await asyncio.sleep(0.05)
        write_config(tmp_path, "b")
        assert (await reload(served))[0] == 201
        assert (await config(served))["a"] == status("UNLOADING")
        gate.set()
        assert (await running).json()["usage"]["completion_tokens"] == 5


async def test_a_model_exported_anew_is_swapped(tmp_path: Path) -> None:
    path = write_config(tmp_path, "a")
    async with serving(source=path) as served:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "openvino_model.xml").write_text("<new/>")
        assert (await reload(served))[0] == 201
        assert len(served.models.engines) == 2
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"model_config_list": [{"config": {"name": "a"}}]}', "base_path"),
        ('{"model_config_list": [], "surplus": 1}', "surplus"),
        (json.dumps({"model_config_list": [{"config": {"name": "broken", "base_path": "broken"}}]}), "not a model"),
        (
            json.dumps(
                {
                    "model_config_list": [
                        {"config": {"name": "new", "base_path": "new"}},
                        {"config": {"name": "broken", "base_path": "broken"}},
                    ]
                }
            ),
            "not a model",
        ),
    ],
)
async def test_a_bad_config_is_rejected_whole(tmp_path: Path, text: str, message: str) -> None:
    path = write_config(tmp_path, "a")
    async with serving(source=path) as served:
        path.write_text(text)
        code, answer = await reload(served)
        assert code == 412
        assert answer["error"].startswith("Reloading config file failed. ")
        assert message in answer["error"]
        assert [card["id"] for card in (await served.client.get("/v3/models")).json()["data"]] == ["a"]
        assert await config(served) == {"a": status("AVAILABLE")}
        assert (await served.post("/v3/completions", model="broken", prompt="hi")).status_code == 404
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)


async def test_a_config_that_is_gone_is_said_in_ovms_s_words(tmp_path: Path) -> None:
    path = write_config(tmp_path, "a")
    async with serving(source=path) as served:
        path.unlink()
        code, answer = await reload(served)
        assert code == 412
        assert answer["error"].startswith("Config file not found or cannot open. ")
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)


async def test_the_file_is_polled(tmp_path: Path) -> None:
    path = write_config(tmp_path, "a")
    async with serving(source=path, options=ServerOptions(poll_seconds=0.01)) as served:
        path.write_text("{")
        await asyncio.sleep(0.05)
        assert await served.text("/v3/completions", model="a", prompt="hi", max_tokens=1)
        write_config(tmp_path, "a", "b")
        async with asyncio.timeout(5):
            while "b" not in await config(served):
                await asyncio.sleep(0.01)
        path.unlink()
        await asyncio.sleep(0.05)
        assert await served.text("/v3/completions", model="b", prompt="hi", max_tokens=1)


async def test_two_servers_in_one_process_share_nothing(tmp_path: Path) -> None:
    async with serving(source=write_config(tmp_path, "a")) as one, serving() as two:
        assert list(await config(one)) == ["a"]
        assert list(await config(two)) == ["m"]


async def test_what_an_entry_says_of_its_graph_reaches_the_model(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Recording(FakeModels):
        def __call__(self, folder: Path, **settings: Any) -> Any:
            seen.append({key: settings[key] for key in ("graph_path", "device", "plugin_config")})
            return super().__call__(folder, **settings)

    entry = {"name": "m", "base_path": "m", "graph_path": "g.pbtxt", "target_device": "GPU", "plugin_config": {"A": 1}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_config_list": [{"config": entry}]}))
    async with serving(Recording(), source=path) as served:
        assert seen == [{"graph_path": "g.pbtxt", "device": "GPU", "plugin_config": {"A": 1}}]
        path.write_text(json.dumps({"model_config_list": [{"config": {**entry, "target_device": "CPU"}}]}))
        assert (await reload(served))[0] == 201
        assert seen[-1]["device"] == "CPU"


async def test_keys_without_effect_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"mediapipe_config_list": [{"name": "m", "nireq": 4, "subconfig": "s.json"}]}))
    async with serving(source=path):
        assert "model m: without effect here: nireq, subconfig" in caplog.text
