"""Requests for one adapter are rendered by its own chat template; what is summed speaks as the base does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Served, serving, token_ids, write_lora_config

pytestmark = pytest.mark.anyio

CHATS = ["/v3/chat/completions", "/v1/chat/completions"]
MESSAGES = [{"role": "user", "content": "hi"}]
BASE_PROMPT = "<user>hi<a>"
OWN_PROMPT = "SQL for hi ###"
ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


def write_template(folder: Path, text: str) -> Path:
    """Write the configuration of the tests, with a template for the adapter `sql`."""
    path = write_lora_config(folder)
    (folder / "loras" / "sql" / "chat_template.jinja").write_text(text)
    return path


OWN = "{% for m in messages %}SQL for {{ m.content }}{% endfor %}{{ ' ###' if add_generation_prompt }}"


async def prompt_tokens(served: Served, path: str, **body: Any) -> int:
    answer = await served.post(path, messages=MESSAGES, max_tokens=1, **body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


@pytest.mark.parametrize("path", CHATS)
async def test_an_adapter_brings_its_template(tmp_path: Path, path: str) -> None:
    async with serving(source=write_template(tmp_path, OWN)) as served:
        for model in ("sql", "base:sql"):
            assert await prompt_tokens(served, path, model=model) == len(OWN_PROMPT)
        for model in ("base", "tools", "mix", "plain"):
            assert await prompt_tokens(served, path, model=model) == len(BASE_PROMPT)
        blend = [{"alias": "sql"}, {"alias": "tools"}]
        assert await prompt_tokens(served, path, model="base", lora=blend) == len(BASE_PROMPT)
        assert await prompt_tokens(served, path, model="base", lora=blend[:1]) == len(OWN_PROMPT)


async def test_tokenize_renders_with_it_too(tmp_path: Path) -> None:
    async with serving(source=write_template(tmp_path, OWN)) as served:
        for model, prompt in (("sql", OWN_PROMPT), ("base", BASE_PROMPT)):
            answer = (await served.post("/v1/tokenize", model=model, messages=MESSAGES)).json()
            assert answer["tokens"] == token_ids(prompt)


async def test_a_template_alone_is_a_new_version(tmp_path: Path) -> None:
    path = write_template(tmp_path, OWN)
    async with serving(source=path) as served:
        assert await prompt_tokens(served, CHATS[0], model="sql") == len(OWN_PROMPT)
        (tmp_path / "loras" / "sql" / "chat_template.jinja").write_text("other")
        assert (await served.client.post("/v1/config/reload")).status_code in (200, 201)
        assert await prompt_tokens(served, CHATS[0], model="sql") == len("other")


async def test_an_adapter_whose_template_does_not_compile_is_refused(tmp_path: Path) -> None:
    async with serving(source=write_template(tmp_path, "{% for %}")) as served:
        answer = await served.post(CHATS[1], model="sql", messages=MESSAGES)
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "adapter_config_invalid"
        assert "the chat template does not compile" in answer.json()["error"]["message"]
        assert await prompt_tokens(served, CHATS[1], model="tools") == len(BASE_PROMPT)


async def test_a_hostile_template_fails_its_own_requests_alone(tmp_path: Path) -> None:
    async with serving(source=write_template(tmp_path, ENDLESS)) as served:
        hostile = [asyncio.create_task(served.post(CHATS[1], model="sql", messages=MESSAGES)) for _ in range(3)]
        for _ in range(5):
            assert await prompt_tokens(served, CHATS[1], model="base") == len(BASE_PROMPT)
        for answer in await asyncio.gather(*hostile):
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "the chat template takes too much time or memory"


async def test_its_special_tokens_are_its_own(tmp_path: Path) -> None:
    path = write_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}")
    (tmp_path / "loras" / "sql" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>"}))
    async with serving(source=path) as served:
        messages = [{"role": "user", "content": "</s>"}]
        answer = (await served.post("/v1/tokenize", model="sql", messages=messages)).json()
        assert answer["tokens"] == [256, *b"</s>"]
