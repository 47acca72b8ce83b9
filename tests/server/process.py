"""`ovms-lora serve` as a process of its own, with fake models unless a test wants real ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKE = "tests.server.fake_server"
REAL = "ovms_lora.cli"


class Process:
    """A running `ovms-lora serve`."""

    def __init__(self, *arguments: str, module: str = FAKE, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *arguments],
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
        deadline = time.monotonic() + 60
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
def running(*arguments: str, module: str = FAKE, **environment: str) -> Iterator[Process]:
    process = Process(*arguments, module=module, **environment)
    try:
        yield process
    finally:
        process.end()


def one_model(*flags: str, **environment: str) -> contextlib.AbstractContextManager[Process]:
    return running("--model_path", "m", "--model_name", "m", "--rest_port", "0", *flags, **environment)
