"""`ovms-lora ray` as a process: it comes up, drains at the first signal, and ends at the second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.engine.lora_models import Bases
from tests.scale.fleet import BASE, events, request, write_repository

TOKENS, STREAMS = 490, 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = Bases(tmp_path_factory.mktemp("bases")).get("llama")
    return write_repository(base, tmp_path_factory.mktemp("repository"))


class Run:
    """A running command, and what it says on stderr. What other tests tell their Ray is not in its environment."""

    def __init__(self, *flags: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "ovms_lora.cli", "ray", "--num_cpus", "0.3", "--rest_port", "0", *flags]
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        told = {**others, "RAY_AUTH_MODE": "disabled", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=told)
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("ready: "):
                self._ready.set()
        self._ready.set()

    def url(self) -> str:
        assert self._ready.wait(120)
        ready = next((line for line in self.lines if line.startswith("ready: ")), None)
        assert ready, self.said()
        return ready.split()[1]

    def said(self) -> str:
        return "".join(self.lines)

    def descendants(self) -> set[int]:
        """The processes that it has started, and theirs."""
        found, new = set[int](), {self.process.pid}
        while new:
            found |= new
            new = {child for pid in new for child in _children(pid)} - found
        return found - {self.process.pid}

    def end(self) -> int:
        code = self.process.wait(60)
        self._reader.join(10)
        return code


def _children(pid: int) -> set[int]:
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has ended
        return set()
    return {int(child) for each in lists for child in each.split()}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def running(*flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Run]:
    run = Run(*flags, environment=environment or {})
    try:
        yield run
    finally:
        run.process.kill()
        run.end()
        assert run.process.stderr
        run.process.stderr.close()


def test_the_first_signal_lets_streams_end_and_refuses_what_is_new(config: Path) -> None:
    # As docs/ray.md gives it for clusters.
    environment = {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }
    flags = ("--config_path", str(config))
    with running(*flags, environment=environment) as run, ThreadPoolExecutor(STREAMS) as pool:
        url, begun = run.url(), threading.Barrier(STREAMS + 1)
        streams = [pool.submit(stream, url, begun) for _ in range(STREAMS)]
        begun.wait(60)
        started = run.descendants()
        run.process.send_signal(signal.SIGTERM)
        # Not a completion: it might wait for its turn until the drain is over.
        while (code := httpx.get(f"{url}/v1/models", timeout=60).status_code) == 200:
            time.sleep(0.05)
        assert code == 503
        assert httpx.post(f"{url}/v1/completions", json=request(BASE), timeout=60).status_code == 503
        assert [each.result(60) for each in streams] == ["[DONE]"] * STREAMS
        assert run.end() == 0, run.said()
        assert "Traceback" not in run.said()
        deadline = time.monotonic() + 10
        while left := {pid for pid in started if _alive(pid)}:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def test_what_does_not_end_in_time_is_cut_and_says_so(config: Path) -> None:
    flags = ("--config_path", str(config), "--limit", "drain_seconds=0.5")
    with running(*flags) as run, httpx.Client(base_url=run.url(), timeout=60) as client:
        body = request(BASE, max_tokens=TOKENS, n=100, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as answer:
            heard = events(answer)
            next(heard)
            # Signals that come to a process which goes on after a stop may go to any of its threads.
            for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM):
                run.process.send_signal(number)
            last = list(heard)[-1]
        assert last["error"]["message"] == "the server is shutting down"
        assert run.end() == 0, run.said()


def stream(url: str, begun: threading.Barrier) -> object:
    """Read a stream that lasts for seconds, as there are others; return its last event."""
    body = request(BASE, max_tokens=TOKENS, stream=True)
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        heard = events(answer)
        next(heard)
        begun.wait(60)
        return list(heard)[-1]


def test_a_second_signal_ends_it_at_once(config: Path) -> None:
    with running("--config_path", str(config)) as run, httpx.Client(base_url=run.url(), timeout=60) as client:
        body = request(BASE, max_tokens=TOKENS, stream=True)
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(events(answer))
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            run.process.send_signal(signal.SIGINT)
            assert run.process.wait(5) == 128 + signal.SIGINT


def test_a_model_that_cannot_be_loaded_is_said_and_ends_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with running("--model_path", str(tmp_path / "empty")) as run:
        assert run.end() == 1
    assert "\nerror: the replicas do not start" in run.said()
    assert "AttributeError" not in run.said()
    assert "\nhint: " in run.said()


def test_a_signal_before_it_is_ready_ends_it(config: Path) -> None:
    with running("--config_path", str(config)) as run:
        while "Started a local Ray" not in run.said():
            time.sleep(0.05)
            assert run.process.poll() is None, run.said()
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 128 + signal.SIGINT, run.said()
        assert "Traceback" not in run.said()
