"""What the exporter leaves, config.json included, is what the server serves."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from ovms_lora.engine.model import load_model
from ovms_lora.server.app import build_app
from ovms_lora.server.model_source import ConfigFile
from ovms_lora.server.options import ServerOptions
from tests.export.conftest import Workshop

QUESTION = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_exported_models_and_adapters_answer_over_http(exported: Workshop) -> None:
    app = build_app(ServerOptions(poll_seconds=0), ConfigFile(exported.config), load_model)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        async with asyncio.timeout(60):
            while (await client.get("/v2/health/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        names = ("base", "small", "merged", "sql", "tools", "mix", "base:sql")
        calls = [client.post("/v3/completions", json={"model": name, **QUESTION}) for name in names]
        answers = [response.json() for response in await asyncio.gather(*calls)]
    texts = {name: answer["choices"][0]["text"] for name, answer in zip(names, answers, strict=True)}
    assert all(answer["usage"]["completion_tokens"] == 8 for answer in answers)
    assert texts["sql"] == texts["base:sql"]
    assert len({texts["base"], texts["sql"], texts["tools"], texts["mix"]}) == 4
