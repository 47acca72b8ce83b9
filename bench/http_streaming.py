"""What HTTP costs: tokens per second of streams over a socket, against the same engine asked directly, in turn.

The server and its client are processes of their own; the engine that is asked directly is in this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.models import ROOT
from bench.workload import Server, in_turn, prompts, rates

_VOCABULARY = 1000
_READY_SECONDS = 120


def measure(model: Path, *, streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure both; print and return the numbers."""
    asked = prompts(streams, 16, vocabulary=_VOCABULARY)
    direct = Server(model)
    with _served(model) as port:
        cases: dict[str, Callable[[], float]] = {
            "engine": lambda: _per_second(direct.run(asked, [()] * streams, max_tokens=tokens)),
            "http": lambda: _per_second(_client(port, asked, tokens)),
        }
        found = rates(in_turn(cases, rounds))
    direct.close()
    for name, rate in found.items():
        print(
            f"{name:8s} {rate.median:8.1f} tokens/s  ({rate.low:.1f} to {rate.high:.1f})  {rate.ratio:6.3f} of engine"
        )
    return {"model": model.name, "streams": streams, "cases": {name: asdict(rate) for name, rate in found.items()}}


def _per_second(answer: tuple[int, float]) -> float:
    return answer[0] / answer[1]


@contextmanager
def _served(model: Path) -> Iterator[int]:
    """Serve the model in a process of its own; yield the port."""
    command = [sys.executable, "-m", "ovms_lora.cli", "serve", "--model_path", str(model), "--model_name", "m"]
    process = subprocess.Popen([*command, "--rest_port", "0", "--log_level", "INFO"], stderr=subprocess.PIPE, text=True)
    try:
        yield _port_of(process)
    finally:
        process.terminate()
        process.wait(_READY_SECONDS)


def _port_of(process: subprocess.Popen[str]) -> int:
    assert process.stderr, "piped"
    for line in process.stderr:
        if line.startswith("ready: "):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it never waits for a reader
            return int(line.split()[1].rsplit(":", 1)[1])
    raise SystemExit("error: the server did not start")


def _client(port: int, asked: list[list[int]], tokens: int) -> tuple[int, float]:
    """Have a process of its own stream all prompts; return tokens and seconds."""
    job = json.dumps({"port": port, "prompts": asked, "tokens": tokens})
    command = [sys.executable, "-m", "bench.stream_client"]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=True, cwd=ROOT)
    return len(asked) * tokens, float(done.stdout)
