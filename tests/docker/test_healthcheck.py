"""The health command finds the server in the command line of process 1, and says what it says."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from ovms_lora.server.serve_flags import serve_parser
from tests.docker.images import ROOT

SERVE = ["/opt/ovms-lora/bin/python", "/opt/ovms-lora/bin/ovms-lora", "serve"]


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def server(status: int) -> Iterator[int]:
    """Answer one request with a status; give the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.handle_request)
        thread.start()
        yield int(listening.server_address[1])
        thread.join()


def command_line(folder: Path, *words: str) -> Path:
    path = folder / "cmdline"
    path.write_text("\0".join([*SERVE, *words]) + "\0")
    return path


@pytest.mark.parametrize(
    ("words", "authority"),
    [
        ([], "127.0.0.1:8000"),
        (["--rest_bind_address", "0.0.0.0"], "127.0.0.1:8000"),
        (["--rest_bind_address", "0.0.0.0", "--rest_port", "9001", "--config_path", "c.json"], "127.0.0.1:9001"),
        (["--rest-bind-address=::", "--rest-port=9001"], "[::1]:9001"),
        (["--rest_bind_address", "0.0.0.0", "--rest_bind_address", "10.0.0.7"], "10.0.0.7:8000"),
        (["--lora-modules", "a=b", "c=d", "--enable-lora", "--rest_port", "1"], "127.0.0.1:1"),
    ],
)
def test_it_asks_where_the_server_listens(healthcheck: ModuleType, words: list[str], authority: str) -> None:
    assert healthcheck.ready_url([*SERVE, *words]) == f"http://{authority}/v2/health/ready"


def test_an_init_process_may_stand_before_it(healthcheck: ModuleType) -> None:
    words = ["/sbin/docker-init", "--", *SERVE, "--rest_port", "9001"]
    assert healthcheck.ready_url(words) == "http://127.0.0.1:9001/v2/health/ready"


def test_its_defaults_are_those_of_the_server(healthcheck: ModuleType) -> None:
    flags = serve_parser().parse_all([])
    assert healthcheck.ready_url([]) == f"http://{flags.rest_bind_address}:{flags.rest_port}/v2/health/ready"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1)])
def test_the_answer_decides(
    healthcheck: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    with server(status) as port:
        assert healthcheck.main(command_line(tmp_path, "--rest_port", str(port))) == code
    assert capsys.readouterr().out == f"http://127.0.0.1:{port}/v2/health/ready: {status}\n"


def test_a_server_that_is_not_there_is_not_healthy(
    healthcheck: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert healthcheck.main(command_line(tmp_path, "--rest_port", "1")) == 1
    assert "refused" in capsys.readouterr().out


def test_a_proxy_of_the_environment_is_not_asked(
    healthcheck: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with server(200) as port:
        assert healthcheck.main(command_line(tmp_path, "--rest_port", str(port))) == 0
