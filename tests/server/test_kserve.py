"""KServe's `/v2`, as OVMS has it for graphs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.serving import Served, serving, write_lora_config

pytestmark = pytest.mark.anyio

MISSING = {"error": "Model with requested name is not found"}


@pytest.fixture
async def adapted(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(source=write_lora_config(tmp_path)) as served:
        yield served


@pytest.mark.parametrize("version", ["", "/versions/1", "/versions/7"])
@pytest.mark.parametrize("name", ["plain", "base", "sql", "mix"])
async def test_models_adapters_and_composites_are_described(adapted: Served, name: str, version: str) -> None:
    ready = await adapted.client.get(f"/v2/models/{name}{version}/ready")
    assert (ready.status_code, ready.content) == (200, b"")
    described = await adapted.client.get(f"/v2/models/{name}{version}")
    assert described.json() == {
        "name": name,
        "versions": ["1"],
        "platform": "OpenVINO",
        "inputs": [{"name": "input", "datatype": "INVALID", "shape": []}],
        "outputs": [{"name": "output", "datatype": "INVALID", "shape": []}],
    }


@pytest.mark.parametrize("path", ["other", "other/ready", "other/versions/1", "other/versions/1/ready"])
async def test_other_names_are_not_found(adapted: Served, path: str) -> None:
    response = await adapted.client.get(f"/v2/models/{path}")
    assert (response.status_code, response.json()) == (404, MISSING)


async def test_what_drains_is_not_ready(adapted: Served) -> None:
    adapted.state.lifecycle.draining = True
    for path in ("/v2/health/ready", "/v2/models/base/ready", "/v2/models/sql/versions/1/ready"):
        assert (await adapted.client.get(path)).status_code == 503
    assert (await adapted.client.get("/v2/health/live")).status_code == 200


async def test_the_server_describes_itself(adapted: Served) -> None:
    assert set((await adapted.client.get("/v2")).json()) == {"name", "version", "extensions"}
