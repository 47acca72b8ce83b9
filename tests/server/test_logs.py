"""The log: what clients send is not in it, at no level, whether they are answered or refused or something fails."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.errors import EngineError
from ovms_lora.server import logs
from ovms_lora.server.keys import plain_keys
from ovms_lora.server.options import ServerOptions
from tests.adapters.adapter_files import good_config, write_adapter
from tests.server.serving import Served, serving, write_lora_config

pytestmark = pytest.mark.anyio

SECRET = "a-secret-prompt"
KEY = "sk-the-secret-key"
PATHS = ("/v3/completions", "/v1/completions", "/v3/chat/completions", "/v1/chat/completions", "/v1/tokenize")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that the process logs at DEBUG, of every library but the test's own client, as the server writes it."""
    root, written = logging.getLogger(), io.StringIO()
    level = root.level
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs._Formatter())
    handler.addFilter(lambda record: not record.name.startswith("http"))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    logging.getLogger("ovms_lora").setLevel(logging.DEBUG)
    yield written
    root.removeHandler(handler)
    root.setLevel(level)
    logging.getLogger("ovms_lora").setLevel(logging.NOTSET)


# What is sent beside the prompt: fields that are answered, and fields that are refused.
BODIES: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"temperature": 9},
    {"stop": SECRET},
    {"stop": [SECRET] * 99},
    {"seed": SECRET},
    {"model": SECRET},
    {"user": SECRET},
    {"logit_bias": {SECRET: 1}},
    {"lora_alphas": {SECRET: 1}},
    {"lora": [{"alias": SECRET}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": SECRET, "schema": {"type": SECRET}}}},
    {"structured_outputs": {"regex": f"(({SECRET}"}},
    {"tools": [{"type": "function", "function": {"name": SECRET, "parameters": {"type": SECRET}}}]},
    {"chat_template_kwargs": {"add_generation_prompt": SECRET}},
]


def body(more: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": SECRET}]
    return {"model": "base", "prompt": SECRET, "messages": messages, "max_tokens": 2, **more}


async def test_neither_prompts_nor_keys_are_logged(tmp_path: Path, log: io.StringIO) -> None:
    options = ServerOptions(poll_seconds=0, log_level="debug", api_keys=plain_keys(KEY))
    async with serving(source=write_lora_config(tmp_path), options=options) as served:
        for given in (f"Bearer {KEY}", f"Bearer {KEY}x", f"Basic {KEY}"):
            served.client.headers["Authorization"] = given
            for path in PATHS:
                for more in BODIES:
                    await served.client.post(f"{path}?api_key={KEY}", json=body(more))
                await served.client.post(path, content=f'{{"prompt": "{SECRET}"')
    assert "POST /v3/completions 200" in log.getvalue()
    assert "POST /v3/completions 412" in log.getvalue()
    assert "POST /v3/completions 401" in log.getvalue()
    assert SECRET not in log.getvalue()
    assert KEY not in log.getvalue()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_in_a_request_is_logged_without_its_words(
    served: Served, log: io.StringIO, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(_engine: object, request: Any) -> None:
        del request
        raise ValueError(f"cannot do {SECRET}")

    monkeypatch.setattr(type(served.models.engines[0]), "submit", fail)
    response = await served.post("/v1/completions", model="m", prompt=SECRET, stream=stream)
    assert response.status_code == 500
    logging.getLogger("ovms_lora.x").debug("done")
    assert SECRET not in log.getvalue() + response.text


async def test_a_failing_step_is_logged(served: Served, log: io.StringIO) -> None:
    served.models.runners["m"].fail_next = EngineError("the device has failed")
    await served.post("/v1/completions", model="m", prompt=SECRET)
    assert "failed: the device has failed" in log.getvalue()
    assert SECRET not in log.getvalue()


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except type(error) as caught:
        return caught


def written(log: io.StringIO, error: Exception, request: str) -> list[str]:
    token = logs.request_id.set(request)
    logging.getLogger("ovms_lora.x").error("it failed: \x1b[31m\n%s", "forged\u2028line", exc_info=error)
    logs.request_id.reset(token)
    return log.getvalue().splitlines()


def test_a_traceback_of_a_request_says_where_but_not_what(log: io.StringIO) -> None:
    lines = written(log, raised(ValueError(SECRET), raised(KeyError(SECRET))), "abc")
    text = "\n".join(lines)
    assert "  KeyError\n  which led to:\n" in text
    assert lines[-1] == "  ValueError"
    assert re.search(r'File ".*test_logs.py", line \d+, in raised', text)
    assert SECRET not in text


def test_errors_for_clients_and_of_the_server_keep_their_words(log: io.StringIO) -> None:
    assert (
        written(log, raised(EngineError("the device has failed")), "abc")[-1] == "  EngineError: the device has failed"
    )
    assert written(log, raised(ValueError("no such option")), "-")[-1] == "  ValueError: no such option"


def test_nothing_that_is_logged_begins_a_line_of_its_own(log: io.StringIO) -> None:
    error = raised(EngineError("one\n2026-01-01 00:00:00 ERROR [-] forged\x1b[2J\x9b\x7f\r"))
    first, *others = written(log, error, "-")
    assert first.endswith(r"it failed: \x1b[31m\x0aforged\x2028line")
    assert all(line.startswith("  ") for line in others)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", log.getvalue())


async def test_errors_tell_no_paths_addresses_or_tracebacks(tmp_path: Path) -> None:
    write_adapter(tmp_path / "found" / "bad", config=good_config(use_dora=True))
    write_adapter(tmp_path / "found" / "cut", weights=b"")
    path = write_lora_config(tmp_path, lora_options={"dynamic_lora_loading_path": "found"})
    async with serving(source=path) as served:
        bodies = [body(more) for more in BODIES] + [body({"model": name}) for name in ("bad", "cut", "base:bad")]
        for route in PATHS:
            for each in bodies:
                text = (await served.client.post(route, json=each)).text
                assert not re.search(r'0x[0-9a-f]{6}|Traceback|File "|\.py\b', text), text
                assert str(tmp_path) not in text
        (tmp_path / "loras" / "sql" / "adapter_model.safetensors").write_bytes(b"")
        assert str(tmp_path) not in (await served.post(PATHS[0], **body({"model": "nobody"}))).text
