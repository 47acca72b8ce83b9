"""The server as a process: real sockets, signals and exit codes."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.process import one_model, running
from tests.server.serving import write_config


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with one_model() as process:
        yield process.url


def test_a_client_that_hangs_up_is_noticed() -> None:
    with one_model(STEP_SECONDS="0.01") as process, httpx.Client(base_url=process.url) as client:
        body = {"model": "m", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v3/completions", json=body) as response:
            pieces = response.iter_bytes()  # kept: an iterator that is dropped hangs up
            assert next(pieces)
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


@pytest.mark.parametrize("declared", [True, False])
def test_who_sends_too_much_hears_of_it(url: str, declared: bool) -> None:
    """The connection must not be reset while the client still writes: that loses the answer."""
    body = b"x" * 4_000_000
    with httpx.Client(base_url=url) as client:
        for _ in range(5):
            pieces = (body[begin : begin + 100_000] for begin in range(0, len(body), 100_000))
            answer = client.post("/v3/completions", content=body if declared else pieces)
            assert answer.status_code == 413
