"""The server as a process: real sockets, the real openai client, signals and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.serving import write_config

ROOT = Path(__file__).parents[2]


class Process:
    """A running `ovms-lora serve`."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.fake_server", "serve", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, start: str) -> str:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for line in self.lines:
                if line.startswith(start):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line {start!r} in {self.lines}")

    @property
    def url(self) -> str:
        return self.wait_for("ready: ").split()[1]

    def code(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(20)
        self._reader.join()
        return code

    def end(self) -> None:
        """Kill what still runs, and clean up."""
        if self.process.poll() is None:
            self.process.kill()
        self.code()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Process]:
    process = Process(*arguments, **environment)
    try:
        yield process
    finally:
        process.end()


def one_model(**environment: str) -> contextlib.AbstractContextManager[Process]:
    return running("--model_path", "m", "--model_name", "m", "--rest_port", "0", **environment)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with one_model() as process:
        yield process.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("dialect", ["v1", "v3"])
def test_the_openai_client_completes(url: str, dialect: str) -> None:
    with openai.OpenAI(base_url=f"{url}/{dialect}", api_key="none", max_retries=0) as client:
        completion = client.completions.create(model="m", prompt="hello", max_tokens=5, temperature=0, logprobs=2)
        text = completion.choices[0].text
        assert len(text) == 5
        assert completion.usage
        assert completion.usage.completion_tokens == 5
        stream = client.completions.create(model="m", prompt="hello", max_tokens=5, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text


@pytest.mark.parametrize("dialect", ["v1", "v3"])
def test_the_openai_client_chats(url: str, dialect: str) -> None:
    with openai.OpenAI(base_url=f"{url}/{dialect}", api_key="none", max_retries=0) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model="m", messages=messages, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
        )
        assert chat.choices[0].logprobs
        assert chat.choices[0].logprobs.content
        stream = client.chat.completions.create(
            model="m",
            messages=messages,
            max_tokens=5,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == chat.choices[0].message.content
        assert chunks[-1].usage
        assert chat.usage
        assert chunks[-1].usage.total_tokens == chat.usage.total_tokens


def test_the_openai_client_gets_several_choices(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `x` does not exist"):
        client.completions.create(model="x", prompt="hello")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="m", prompt="hello", temperature=9)
    assert refused.value.param == "temperature"


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"


def test_a_client_that_hangs_up_is_noticed() -> None:
    with one_model(STEP_SECONDS="0.01") as process, httpx.Client(base_url=process.url) as client:
        body = {"model": "m", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v3/completions", json=body) as response:
            pieces = response.iter_bytes()  # an iterator that is dropped hangs up
            next(pieces)
            assert 'vllm:num_requests_running{model_name="m"} 1.0' in client.get("/metrics").text
        time.sleep(0.2)
        assert 'vllm:num_requests_running{model_name="m"} 0.0' in client.get("/metrics").text


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(sent: signal.Signals) -> None:
    with one_model(STEP_SECONDS="0.01") as process, httpx.Client(base_url=process.url) as client:
        body = {"model": "m", "prompt": "hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v3/completions", json=body) as response:
            events = response.iter_text()
            next(events)
            process.process.send_signal(sent)
            time.sleep(0.1)
            with httpx.Client(base_url=process.url) as other:
                assert other.get("/v2/health/ready").status_code == 503
                refused = other.post("/v3/completions", json=body)
                assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            assert "".join(events).endswith("data: [DONE]\n\n")
        assert process.code() == 0


def test_a_second_signal_exits_now() -> None:
    with one_model(STEP_SECONDS="0.01") as process, httpx.Client(base_url=process.url) as client:
        body = {"model": "m", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v3/completions", json=body) as response:
            next(response.iter_bytes())
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(2) == 128 + signal.SIGTERM


def test_an_idle_server_ends_at_once() -> None:
    with one_model() as process:
        assert process.url
        process.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.code() == 0
        assert time.monotonic() - begun < 3


def test_a_busy_port_is_an_error_with_a_hint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with running("--model_path", "m", "--rest_port", port) as process:
            assert process.code() == 1
            assert process.lines == [
                f"error: port {port} of 127.0.0.1 is in use",
                "hint: stop what listens there, or give another --rest_port",
            ]


def test_without_a_model_the_server_exits(tmp_path: Path) -> None:
    with running("--config_path", str(write_config(tmp_path, "broken")), "--rest_port", "0") as process:
        assert process.code() == 1
        assert process.lines[-2:] == ["error: broken is not a model", "hint: export it again"]
        assert not any("Traceback" in line for line in process.lines)


def test_a_config_of_several_models_says_what_it_serves(tmp_path: Path) -> None:
    path = write_config(tmp_path, "base_model", "broken", "merged_model")
    with running("--config_path", str(path), "--rest_port", "0") as process:
        assert process.wait_for("ready: ").endswith("serving base_model, merged_model")
        assert any("broken is not a model" in line for line in process.lines)


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    with one_model(API_KEY="secret") as process, httpx.Client(base_url=process.url) as client:
        assert client.get("/v3/models").status_code == 401
        assert client.get("/v3/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/v2/health/ready").status_code == 200
        assert not any("secret" in line for line in process.lines)


def test_headers_are_bounded(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        assert client.get("/v2", headers={"X-Long": "x" * 8000}).status_code == 200
        assert client.get("/v2", headers={"X-Long": "x" * 20000}).status_code == 431
