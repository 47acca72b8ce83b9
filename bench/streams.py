"""Streams: completions asked of a server at given times, by a client process, and what came when."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
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
    parts = urlsplit(f"{url.rstrip('/')}/completions")
    sent = [{"at": ask.at, "body": ask.body} for ask in asks]
    job = {"host": parts.hostname, "port": parts.port or 80, "path": parts.path, "asks": sent}
    command = [sys.executable, "-m", "bench.stream_client"]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return [Stream(**found) for found in json.loads(done.stdout)]
