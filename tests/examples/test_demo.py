"""The demo beside a stand-in for exporter and server: it asks everything at once, and leaves nothing running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Called in place of Python by the demo: exports at once or never, and serves texts that tell the model's name.
STAND_IN = """#!{python}
import http.server, json, pathlib, os, sys, time
if "serve" not in sys.argv:
    pathlib.Path({folder!r}, "exporting").write_text(str(os.getpid()))
    time.sleep({export_seconds})
    sys.exit({export_code})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"")
    def do_POST(self):
        model = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        self.answer(json.dumps({{"choices": [{{"text": "I am " + model}}]}}).encode())
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--rest_port") + 1])), Handler)
pathlib.Path({folder!r}, "serving").write_text(str(os.getpid()))
server.serve_forever()
"""
DEMO = "import sys, demo; sys.executable = sys.argv[1]; sys.exit(demo.main())"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path, port: int) -> Iterator[Start]:
    """Starts the demo; `variables` are of its environment."""
    demos = []

    def run(
        *, once: bool = False, export_seconds: int = 0, export_code: int = 0, **variables: str
    ) -> subprocess.Popen[str]:
        path = tmp_path / "python"
        settings = {"python": sys.executable, "folder": str(tmp_path), "export_seconds": export_seconds}
        path.write_text(STAND_IN.format(**settings, export_code=export_code))
        path.chmod(0o755)
        environment = {**os.environ, "DEMO_PORT": str(port), "PYTHONPATH": str(ROOT / "examples"), **variables}
        demo = subprocess.Popen(
            [sys.executable, "-c", DEMO, str(path)],
            env=environment | {"DEMO_ONCE": "1" if once else "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        demos.append(demo)
        return demo

    yield run
    for demo in demos:
        demo.kill()
        demo.communicate()


def pid_of(folder: Path, what: str) -> int:
    """Wait until a stand-in says that it is exporting or serving; return its process id."""
    until = time.monotonic() + 30
    while not (folder / what).exists() or not (folder / what).read_text():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.02)
    return int((folder / what).read_text())


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_shows_what_each_model_answers_and_ends_the_server(start: Start, tmp_path: Path) -> None:
    demo = start(once=True)
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 0, err
    assert [name for name in ("base_model", "merged_model", "sql", "mix", "tools") if f"I am {name}" not in out] == []
    assert "6 requests were sent at once; 6 have the answer that each gets alone." in " ".join(out.split())
    assert not runs(pid_of(tmp_path, "serving"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("moment", ["exporting", "serving"])
def test_a_signal_ends_it_and_what_it_started(
    moment: str, number: int, code: int, start: Start, tmp_path: Path
) -> None:
    demo = start(export_seconds=60 if moment == "exporting" else 0)
    pid = pid_of(tmp_path, moment)
    demo.send_signal(number)
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == code
    assert err.endswith("demo stopped\n") and "Traceback" not in err
    assert not runs(pid)


def test_a_port_that_is_taken_is_said_before_anything_is_exported(start: Start, port: int, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", port)):
        demo = start()
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert f"error: cannot listen on port {port}: Address already in use" in err
    assert f"hint: stop what listens there, or take another one: DEMO_PORT={port % 65535 + 1} make demo" in err
    assert not (tmp_path / "exporting").exists()


@pytest.mark.parametrize("text", ["", "x", "0", "65536", "-1", "8000 "])
def test_a_port_that_is_none(text: str, start: Start) -> None:
    demo = start(DEMO_PORT=text)
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert err == f"error: DEMO_PORT {text!r} is not a port\nhint: DEMO_PORT=8001 make demo\n"


def test_an_export_that_fails_ends_it(start: Start, tmp_path: Path) -> None:
    demo = start(export_code=1)
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "error: base_model was not exported" in err and "Traceback" not in err
    assert not (tmp_path / "serving").exists()
