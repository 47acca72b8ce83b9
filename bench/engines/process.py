"""EngineProcess: an engine in a process of its own, which stands still while it is not asked.

It is stopped by a signal between its jobs, so that threads that spin while they wait take nothing from the others.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.engines.job import Answer, Job, Setup
from bench.models import CACHE, ROOT

# Of engines whose packages cannot stand beside ours.
ENVIRONMENTS = {"vllm": CACHE / "vllm"}


class EngineProcess:
    """Use it in `with`; raises SystemExit with the end of its log when the engine ends before its time."""

    def __init__(self, engine: str, setup: Setup) -> None:
        self._name = engine
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        python = str(ENVIRONMENTS[engine] / "bin" / "python") if engine in ENVIRONMENTS else sys.executable
        command = [python, "-m", "bench.engines.worker"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        self._ask({"engine": engine, "setup": asdict(setup)})
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def run(self, job: Job) -> Answer:
        """Have a job done."""
        self._process.send_signal(signal.SIGCONT)
        try:
            return Answer(**self._ask(asdict(job)))
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout, "piped"
        try:
            self._process.stdin.write(json.dumps(message, default=_text) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self) -> None:
        self._log.seek(0)
        raise SystemExit(f"error: {self._name} has ended: {self._log.read()[-2000:]}")


def _text(value: object) -> str:
    assert isinstance(value, Path), "all else is JSON"
    return str(value)
