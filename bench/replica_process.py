"""ReplicaProcess: one engine in a process of its own, reached through a pipe."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench.replica_profile import Extent, ReplicaMeter
from bench.timed_engine import Answered, Asked, TimedEngine, Waiter
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile

_STOP_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer, and the adapters that are in the graph now."""

    answer: Answered
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """What each replica is started with; it computes in one thread."""

    model: Path
    adapters: Mapping[str, Path]
    limits: ReplicaLimits
    extent: Extent


class ReplicaProcess:
    """Takes `Asked` and an `Extent` to measure; `connection` gives `Ended` and ReplicaProfile."""

    def __init__(self, setup: ReplicaSetup) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_run, args=(other, setup), daemon=True)
        self._process.start()
        other.close()

    def wait_until_ready(self) -> None:
        """Return when it has loaded its model. Raises EOFError when that fails."""
        assert self.connection.recv() == "ready"

    def send(self, message: Asked | Extent) -> None:
        """Have a request answered, or a profile measured."""
        self.connection.send(message)

    def receive(self) -> Ended | ReplicaProfile:
        """Return what it says next. Raises EOFError when it has died."""
        message = self.connection.recv()
        assert isinstance(message, Ended | ReplicaProfile), "nothing else is sent"
        return message

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()


def _run(connection: Connection, setup: ReplicaSetup) -> None:
    measuring = threading.Event()
    waiter, sending = Waiter(), threading.Lock()

    def ended(answer: Answered) -> None:
        if measuring.is_set():
            waiter(answer)
            return
        with sending:
            connection.send(Ended(answer, engine.resident))

    limits = setup.limits
    engine = TimedEngine(
        setup.model,
        setup.adapters,
        ended,
        threads=1,
        engine_options={"max_num_seqs": limits.max_num_seqs},
        max_loras=limits.max_loras,
        max_cpu_loras=limits.max_cpu_loras,
    )
    connection.send("ready")
    while (message := connection.recv()) is not None:
        if isinstance(message, Extent):
            measuring.set()
            profile = ReplicaMeter(engine, waiter, message).measure()
            measuring.clear()
            with sending:
                connection.send(profile)
        else:
            engine.submit(message)
    engine.close()
