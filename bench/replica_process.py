"""ReplicaProcess: one engine in a process of its own, which is measured there: alone, or beside what else runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench.replica_profile import Extent, ReplicaMeter
from bench.timed_engine import Answered, Asked, TimedEngine, Waiter
from ovms_lora.scale.plan.replica import ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile

_STOP_SECONDS = 30
_ANSWER_SECONDS = 900


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """What it is started with; it computes in one thread."""

    model: Path
    adapters: Mapping[str, Path]
    limits: ReplicaLimits


class ReplicaProcess:
    """Ready when it is made. Its methods block; EOFError says that the process has died, TimeoutError that it hangs."""

    def __init__(self, setup: ReplicaSetup) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_run, args=(other, setup), daemon=True)
        self._process.start()
        other.close()
        assert self._said() == "ready"

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, asked: Asked) -> Answered:
        """Have one request answered."""
        self._connection.send(asked)
        answer = self._said()
        assert isinstance(answer, Answered), "what was asked for"
        return answer

    def measure(self, extent: Extent) -> ReplicaProfile:
        """Have the profile measured."""
        self._connection.send(extent)
        profile = self._said()
        assert isinstance(profile, ReplicaProfile), "what was asked for"
        return profile

    def _said(self) -> object:
        if not self._connection.poll(_ANSWER_SECONDS):
            raise TimeoutError("the engine that is measured does not answer")
        return self._connection.recv()


def _run(connection: Connection, setup: ReplicaSetup) -> None:
    answers, limits = Waiter(), setup.limits
    engine = TimedEngine(
        setup.model,
        setup.adapters,
        answers,
        threads=1,
        engine_options={"max_num_seqs": limits.max_num_seqs},
        max_loras=limits.max_loras,
        max_cpu_loras=limits.max_cpu_loras,
    )
    connection.send("ready")
    try:
        while True:
            asked = connection.recv()
            if isinstance(asked, Extent):
                connection.send(ReplicaMeter(engine, answers, asked).measure())
            else:
                engine.submit(asked)
                connection.send(answers.all(1)[0])
    except (EOFError, OSError):  # nobody asks any more
        pass
    finally:
        engine.close()
