"""Templates render in processes that may die, and are shared by threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ovms_lora.core.errors import UnavailableError
from ovms_lora.engine import template_process
from ovms_lora.engine.template_process import TemplateKilledError, TemplateProcesses

RUNS_FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def processes() -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses(limit=2)
    yield processes
    processes.close()


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def request(source: str, **values: Any) -> dict[str, Any]:
    return {"source": source, "values": values}


def test_one_process_answers_many_requests(processes: TemplateProcesses) -> None:
    before = children()
    for number in range(5):
        assert processes.ask(request("{{ n }}", n=number)) == {"text": str(number)}
    assert len(children() - before) <= 1


def test_a_process_that_was_killed_is_replaced(processes: TemplateProcesses) -> None:
    before = children()
    processes.ask(request("x"))
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    time.sleep(0.1)
    assert processes.ask(request("x")) == {"text": "x"}


def test_a_template_without_end_blocks_no_other(processes: TemplateProcesses) -> None:
    with ThreadPoolExecutor(3) as pool:
        endless = pool.submit(processes.ask, request(RUNS_FOREVER))
        others = [pool.submit(processes.ask, request("{{ n }}", n=n)) for n in range(20)]
        assert [other.result(timeout=60)["text"] for other in others] == [str(n) for n in range(20)]
        with pytest.raises(TemplateKilledError):
            endless.result(timeout=60)


def test_a_process_that_does_not_start_is_told(processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_PROGRAM", "ovms_lora.no_such_program")
    with pytest.raises(UnavailableError, match="does not start"):
        processes.ask(request("x"))
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(UnavailableError, match="cannot start"):
        processes.ask(request("x"))


def test_closing_ends_the_processes(processes: TemplateProcesses) -> None:
    before = children()
    processes.ask(request("x"))
    assert children() - before
    processes.close()
    assert not children() - before


def test_processes_end_with_a_parent_that_is_killed() -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ovms_lora.engine.chat import ChatTemplate\n"
        "ChatTemplate('x')\n"
        "print(Path(f'/proc/self/task/{os.getpid()}/children').read_text(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    child = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 10
    while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "zombie" in (child / "status").read_text()


def test_the_process_has_no_secrets_and_little_memory(processes: TemplateProcesses) -> None:
    before = children()
    processes.ask(request("x"))
    (child,) = children() - before
    environment = (Path("/proc") / str(child) / "environ").read_text().split("\0")
    assert {entry.partition("=")[0] for entry in environment if entry} <= {
        *template_process._KEPT_ENVIRONMENT,
        "PYTHONPATH",
    }
    limits = (Path("/proc") / str(child) / "limits").read_text()
    assert str(512 << 20) in limits
