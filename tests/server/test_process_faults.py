"""What may befall the process: steps that hang or fail, signals, a full disk, no descriptors."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx
import pytest

from tests.server.process import FAKE, ROOT, Process, one_model, running
from tests.server.serving import write_config
from tests.server.wellness import WellProcess

LONG = {"model": "m", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with one_model(STEP_SECONDS="0.002") as running_one:
        yield running_one


@pytest.mark.parametrize(
    ("prompt", "status", "message"),
    [("fail", 500, "the device failed in a step"), ("full", 503, "no memory for a step")],
)
def test_a_step_that_fails_is_one_clean_answer(process: Process, prompt: str, status: int, message: str) -> None:
    with WellProcess(process) as well:
        assert json.loads(well.refused(status, model="m", prompt=prompt)) == {"error": message}


def test_only_the_culprit_of_a_batch_fails(process: Process) -> None:
    texts: dict[str, int] = {}

    def ask(prompt: str) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": 60, "ignore_eos": True}
        texts[prompt] = httpx.post(f"{process.url}/v3/completions", json=body, timeout=20).status_code

    with WellProcess(process):
        threads = [Thread(target=ask, args=[prompt]) for prompt in ("a", "b", "c", "fail", "d", "full")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {"a": 200, "b": 200, "c": 200, "d": 200, "fail": 500, "full": 503}


def test_clients_that_vanish_leave_nothing_behind(process: Process) -> None:
    with WellProcess(process), httpx.Client(base_url=process.url) as client:
        for _ in range(20):
            with client.stream("POST", "/v3/completions", json=LONG) as response:
                next(response.iter_bytes())
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v3/completions", json={**LONG, "stream": False}, timeout=0.02)


def test_a_step_that_hangs_ends_the_process_with_its_stacks() -> None:
    with one_model(HEARTBEAT_SECONDS="2") as process, httpx.Client(base_url=process.url, timeout=5) as client:
        assert client.get("/v2/health/live").status_code == 200
        with contextlib.suppress(httpx.TransportError):
            client.post("/v3/completions", json={"model": "m", "prompt": "hang"}, timeout=0.2)
        hung = time.monotonic()
        process.wait_for("Thread 0x")
        assert client.get("/v2/health/live").status_code == 503
        assert client.get("/v2/health/ready").status_code == 503
        assert process.code() == 1
        assert time.monotonic() - hung < 15
        assert any("the engine hangs" in line for line in process.lines)
        assert any("before_step" in line for line in process.lines)


def test_a_slow_step_ends_nothing() -> None:
    with one_model(HEARTBEAT_SECONDS="2", STEP_SECONDS="2.3") as process:
        answer = httpx.post(
            f"{process.url}/v3/completions", json={"model": "m", "prompt": "a", "max_tokens": 2}, timeout=20
        )
        assert answer.status_code == 200
        assert process.process.poll() is None


def test_a_hung_engine_does_not_hold_up_the_exit() -> None:
    with one_model() as process:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{process.url}/v3/completions", json={"model": "m", "prompt": "hang"}, timeout=0.2)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.process.send_signal(signal.SIGTERM)
        assert process.code() in (0, 128 + signal.SIGTERM)


def test_a_killed_server_starts_again_on_its_port(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, "m"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    texts = []
    for _ in range(3):
        with running("--config_path", config, "--rest_port", port) as process:
            url, body = f"{process.url}/v3/completions", LONG | {"temperature": 0}
            with httpx.stream("POST", url, json=body) as response:
                texts.append(next(response.iter_lines()))
                process.process.kill()
                assert process.code() == -signal.SIGKILL
    assert len({json.loads(text.removeprefix("data: "))["choices"][0]["text"] for text in texts}) == 1


def test_a_full_disk_behind_the_log_stops_nothing() -> None:
    command = [sys.executable, "-m", FAKE, "serve", "--model_path", "m", "--model_name", "m", "--rest_port"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen([*command, str(port)], cwd=ROOT, stdout=full, stderr=full)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=60)) as client:
            _until_ready(client)
            for prompt, status in (("hello", 200), ("fail", 500), ("hello", 200)):
                body = {"model": "m", "prompt": prompt, "max_tokens": 4}
                assert client.post("/v3/completions", json=body).status_code == status
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) in (0, 120)  # 120: Python could not write out stderr in the end
    finally:
        server.kill()
        server.wait()


def _until_ready(client: httpx.Client) -> None:
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/v2/health/ready").status_code == 200:
                return
        assert time.monotonic() < until
        time.sleep(0.1)


def test_without_descriptors_the_server_waits_and_recovers(tmp_path: Path) -> None:
    config = write_config(tmp_path, "m")
    arguments = ("--config_path", str(config), "--rest_port", "0", "--file_system_poll_wait_seconds", "1")
    with running(*arguments) as process, WellProcess(process) as well:
        pid = process.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        open_now = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_now + 2, limits[1]))
        host, port = process.url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(20)]
        config.write_text(config.read_text() + " ")  # read anew while nothing can be opened
        time.sleep(2.5)
        assert process.process.poll() is None
        for connection in held:
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        until = time.monotonic() + 10
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{process.url}/v2/health/ready", timeout=2).status_code == 200:
                    break
            assert time.monotonic() < until
        well.check()
