"""`ovms-lora serve` and `ovms-lora ray` as processes, for measurements over HTTP."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.models import ROOT

_STOP_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready: its address, and its first process."""

    url: str
    pid: int


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Serve in a process of its own; yield the address when it is ready."""
    with running("serve", *arguments) as server:
        yield server.url


@contextmanager
def running(verb: str, *arguments: str) -> Iterator[Running]:
    """Run a verb of `ovms-lora` that serves, in processes of its own; end it after that."""
    command = [sys.executable, "-m", "ovms_lora.cli", verb, "--rest_port", "0", "--log_level", "INFO", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr, "piped"
        log = _Log(process.stderr)
        log.start()
        try:
            yield Running(log.address(), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                log.join(_STOP_SECONDS)


def write_config(folder: Path, model: Path, adapters: Mapping[str, Path], **lora_options: Any) -> Path:
    """Write a config.json that names a model `base` and its adapters; return it."""
    listed = [{"alias": alias, "path": str(path)} for alias, path in adapters.items()]
    entry: dict[str, Any] = {"name": "base", "base_path": str(model), "lora_adapters": listed}
    config = {"model_config_list": [{"config": {**entry, "lora_options": lora_options}}]}
    path = folder / f"config-{len(adapters)}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


class _Log(threading.Thread):
    """Reads what a server says to its end, so that it never waits for a reader."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._said: list[str] = []
        self._found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self) -> None:
        """Read; tell the address, or an empty one at the end."""
        for line in self._stream:
            self._said.append(line)
            if line.startswith("ready: "):
                self._found.put(line.split()[1])
        self._found.put("")

    def address(self) -> str:
        """Wait until the server is ready; return its address. Raises SystemExit when it ends before."""
        address = self._found.get()
        if not address:
            raise SystemExit(f"error: the server did not start: {''.join(self._said[-10:])}")
        return address
