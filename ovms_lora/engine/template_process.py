"""TemplateProcesses: a few processes that render chat templates, started when they are needed.

A template that spends too much is killed by the kernel, with its process (`template_program` says why); here that is
noticed, told as an error, and made good by the next process. Safe from several threads, each of which waits.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from typing import Any

from ovms_lora.core.errors import UnavailableError
from ovms_lora.engine.template_program import READY

_PROGRAM = "ovms_lora.engine.template_program"
_START_SECONDS = 60.0
# Processor time is bounded by the process itself; this only ends one that the machine does not let run.
_ANSWER_SECONDS = 20.0
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")


class TemplateKilledError(Exception):
    """The template has spent all the time or memory that it may."""


class _Process:
    """One process and the connection to it."""

    def __init__(self) -> None:
        """Start it. Raises UnavailableError."""
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(entry or "." for entry in sys.path)
        try:
            self._connection, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C in the terminal is not for it
                )
        except OSError as error:
            raise UnavailableError(f"cannot start the process that renders chat templates: {error.strerror}") from error
        if self._receive(_START_SECONDS) != READY:
            self.close()
            raise UnavailableError("the process that renders chat templates does not start")

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def ask(self, request: bytes) -> bytes | None:
        """Return the answer, None when the process has died over it or does not answer."""
        try:
            self._connection.send_bytes(request)
        except OSError:
            return None
        return self._receive(_ANSWER_SECONDS)

    def _receive(self, seconds: float) -> bytes | None:
        try:
            return self._connection.recv_bytes() if self._connection.poll(seconds) else None
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class TemplateProcesses:
    """At most `limit` processes."""

    def __init__(self, limit: int = 2) -> None:
        self._room = threading.BoundedSemaphore(limit)
        self._idle: list[_Process] = []
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Return what `template_program.answer` does. Raises TemplateKilledError, or UnavailableError."""
        asked = json.dumps(request).encode()
        answer: bytes | None = None
        with self._room:
            process = self._take()
            try:
                answer = process.ask(asked)
            finally:
                if answer is None:
                    process.close()
                else:
                    self._idle.append(process)
        if answer is None:
            raise TemplateKilledError
        result: dict[str, str] = json.loads(answer)
        return result

    def close(self) -> None:
        """End the processes that have nothing to do."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            process.close()
        return _Process()


# Whoever trusts a model's folder need not wait for templates of adapters, which can be anybody's.
FOR_MODELS = TemplateProcesses()
FOR_ADAPTERS = TemplateProcesses()
