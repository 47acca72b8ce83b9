"""Streams: completions asked of a server at given times, by a client process, and what came when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from bench.models import ROOT


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: the body of a completion, to be sent `at` seconds after the start."""

    at: float
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer: seconds since the start at which it was asked and at which each event came."""

    sent: float
    status: int
    times: list[float]

    @property
    def ttft(self) -> float:
        """Seconds to the first event."""
        return self.times[0] - self.sent

    @property
    def seconds(self) -> float:
        """Seconds to the last event."""
        return self.times[-1] - self.sent

    @property
    def intervals(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in pairwise(self.times)]


def stream_all(url: str, asks: Sequence[Ask]) -> list[Stream]:
    """Have a process of its own stream all asks from `url`/completions; return what became of each, in their order."""
    with _client(url, asks, subprocess.PIPE) as client:
        assert client.stdout, "piped"
        try:
            said = client.stdout.read()
        except BaseException:
            client.kill()
            raise
    if client.returncode:
        raise SystemExit("error: the client of the measurement failed")
    return [Stream(**stream) for stream in json.loads(said)]


@contextmanager
def streaming(url: str, asks: Sequence[Ask]) -> Iterator[None]:
    """Stream asks in the background until the end of the block; what is not answered by then is left.

    Raises SystemExit when they came to an end before.
    """
    with _client(url, asks, subprocess.DEVNULL) as client:
        try:
            yield
            if client.poll() is not None:
                raise SystemExit("error: the requests in the background ended too early")
        finally:
            client.kill()


def _client(url: str, asks: Sequence[Ask], stdout: int) -> subprocess.Popen[str]:
    parts = urlsplit(f"{url.rstrip('/')}/completions")
    sent = [{"at": ask.at, "body": ask.body} for ask in asks]
    job = {"host": parts.hostname, "port": parts.port or 80, "path": parts.path, "asks": sent}
    command = [sys.executable, "-m", "bench.stream_client"]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, text=True, cwd=ROOT)
    assert client.stdin, "piped"
    json.dump(job, client.stdin)
    client.stdin.close()
    return client
