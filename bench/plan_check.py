"""Is `ovms-lora plan` right? Three real replicas under Poisson traffic, adapters by Zipf's law, and their simulation.

python -m bench.plan_check [--model smollm2] [--seconds 150] [--load 0.25]

Each replica is a process with an engine of one thread; the router in front sends by the same policy as `ovms-lora ray`.
The profile is measured in the same run, in turns with the traffic, on one replica while the others have as much to do
as in the traffic: where three replicas share two cores each is slower than alone, and machines change their speed.
Then the very requests that were served are simulated.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from bench.models import CACHE, MODELS, tiny
from bench.replica_process import Ended, ReplicaProcess, ReplicaSetup
from bench.replica_profile import Extent, mean_profile, write_adapters
from bench.results import write_results
from bench.timed_engine import Asked
from ovms_lora.scale.plan.outcome import Outcome
from ovms_lora.scale.plan.popularity import Popularity
from ovms_lora.scale.plan.replica import Record, ReplicaLimits
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.simulation import Routing, Simulated, simulate
from ovms_lora.scale.plan.token_lengths import TokenLengths
from ovms_lora.scale.plan.workload import BASE, Traffic, Workload
from ovms_lora.scale.routing_policy import KnownReplicas, ReplicaState, choose

_REPLICAS = 3
_ADAPTERS = 24
_RANK = 8
_TURNS = 4
_TOLERANCE = 0.25


class LiveRouter:
    """Sends requests to real replicas at their times, by the policy, and keeps those that find no room."""

    def __init__(self, replicas: list[ReplicaProcess], limits: ReplicaLimits, traffic: Traffic) -> None:
        self._replicas, self._limits, self._traffic = replicas, limits, traffic
        self._rng, self._prompts = random.Random(0), np.random.default_rng()
        self._queue: deque[int] = deque()
        self._ongoing: list[dict[str, str]] = [{} for _ in replicas]  # request → alias
        self._resident: list[frozenset[str]] = [frozenset() for _ in replicas]
        self._record = Record.of(len(traffic.arrivals))
        self._begin = 0.0

    def run(self, requests: range) -> None:
        """Serve some of the traffic, and wait for its last answer."""
        self._begin = time.perf_counter() - self._traffic.arrivals[requests.start]
        for request in requests:
            while (left := self._begin + self._traffic.arrivals[request] - time.perf_counter()) > 0:
                self._listen(left)
            self._queue.append(request)
            self._send()
        while self._queue or any(self._ongoing):
            self._listen(None)

    @property
    def served(self) -> Simulated:
        """What became of it all, in the simulation's form; how busy replicas were is not known."""
        return Simulated(self._traffic, self._record, [0.0] * len(self._replicas), queued=0)

    def run_beside(self, measured: ReplicaProcess, extent: Extent) -> ReplicaProfile:
        """Serve traffic until another replica has measured its profile."""
        self._begin = time.perf_counter()
        measured.send(extent)
        for request, arrival in enumerate(self._traffic.arrivals):
            while (left := self._begin + arrival - time.perf_counter()) > 0 and not measured.connection.poll():
                self._listen(min(left, 0.05))
            if measured.connection.poll():
                break
            self._queue.append(request)
            self._send()
        profile = measured.receive()
        assert isinstance(profile, ReplicaProfile), "it has nothing else to say"
        self._queue.clear()
        while any(self._ongoing):
            self._listen(None)
        return profile

    def _listen(self, seconds: float | None) -> None:
        """Wait for answers, at most so long, and note them."""
        by_connection = {id(replica.connection): number for number, replica in enumerate(self._replicas)}
        for ready in wait([replica.connection for replica in self._replicas], seconds):
            number = by_connection[id(ready)]
            ended = self._replicas[number].receive()
            assert isinstance(ended, Ended), "these measure nothing"
            self._resident[number] = frozenset(ended.resident)
            del self._ongoing[number][ended.answer.name]
            request = int(ended.answer.name)
            self._record.first[request] = ended.answer.first - self._begin
            self._record.done[request] = ended.answer.last - self._begin
            self._record.tiers[request] = ended.answer.tier
        self._send()

    def _send(self) -> None:
        while self._queue:
            request = self._queue[0]
            adapter = self._traffic.adapters[request]
            alias = None if adapter == BASE else f"a{adapter}"
            chosen = choose(KnownReplicas(self._states()), alias, self._rng)
            if chosen is None:
                return
            self._queue.popleft()
            number = int(chosen.replica_id)
            self._ongoing[number][str(request)] = alias or ""
            prompt = tuple(self._prompts.integers(10, 250, self._traffic.prompts[request]).tolist())
            self._replicas[number].send(Asked(str(request), prompt, alias, self._traffic.outputs[request]))

    def _states(self) -> list[ReplicaState]:
        return [
            ReplicaState(
                str(number), resident | set(ongoing.values()) - {""}, len(ongoing), self._limits.max_ongoing_requests
            )
            for number, (resident, ongoing) in enumerate(zip(self._resident, self._ongoing, strict=True))
        ]


def seconds_of_one(replica: ReplicaProcess, workload: Workload) -> float:
    """Return how long a replica alone takes for a request of mean length, when nothing disturbs it."""
    rng = np.random.default_rng()
    seconds = []
    for number in range(12):
        prompt = tuple(rng.integers(10, 250, round(workload.prompts.mean)).tolist())
        replica.send(Asked(str(number), prompt, "a0", round(workload.outputs.mean)))
        ended = replica.receive()
        assert isinstance(ended, Ended), "nothing is measured"
        seconds.append(ended.answer.last - ended.answer.begin)
    return min(seconds)


def compare(real: Outcome, simulated: Outcome) -> dict[str, tuple[float, float]]:
    """Return what was measured and what was predicted, by name."""

    def numbers(of: Outcome) -> dict[str, float]:
        return {
            "tokens/s": of.tokens_per_second,
            "adapter in the graph": of.hits.resident,
            "first token p50": of.ttft.p50,
            "first token p95": of.ttft.p95,
            "whole answer p50": of.e2e.p50,
            "whole answer p95": of.e2e.p95,
        }

    predicted = numbers(simulated)
    return {name: (value, predicted[name]) for name, value in numbers(real).items()}


def check(model: Path, folder: Path, *, seconds: float, load: float, seed: int) -> dict[str, object]:
    """Measure, simulate, print; return all numbers."""
    limits = ReplicaLimits(4, 8, 4 * _RANK, max_num_seqs=4, max_ongoing_requests=4)
    extent = Extent(max_rows=4, max_adapters=4, rank=_RANK, tokens=32, rounds=2)
    adapters = write_adapters(folder, model, _ADAPTERS, rank=extent.rank)
    replicas = [ReplicaProcess(ReplicaSetup(model, adapters, limits, extent)) for _ in range(_REPLICAS)]
    try:
        for replica in replicas:
            replica.wait_until_ready()
        _say("replicas are ready")
        popularity = Popularity.zipf(_ADAPTERS, 1.0, rank=extent.rank)
        lengths = TokenLengths.parse("", "16-64"), TokenLengths.parse("", "8-56")
        workload = Workload(1.0, popularity, *lengths, base_share=0.1)
        rate = load * _REPLICAS / seconds_of_one(replicas[0], workload)
        traffic = Workload(rate, popularity, *lengths, base_share=0.1).draw(round(rate * seconds), seed)
        beside = Workload(rate * 2 / 3, popularity, *lengths, base_share=0.1).draw(100_000, seed + 1)
        _say(f"{len(traffic.arrivals)} requests, {rate:.2f} a second, on {_REPLICAS} replicas of one thread")
        live = LiveRouter(replicas, limits, traffic)
        profiles = []
        for part in np.array_split(np.arange(len(traffic.arrivals)), _TURNS):
            profiles.append(LiveRouter(replicas[1:], limits, beside).run_beside(replicas[0], extent))
            live.run(range(part[0], part[-1] + 1))
    finally:
        for replica in replicas:
            replica.stop()
    profile = mean_profile(profiles)
    simulated = simulate(profile, limits, traffic, replicas=_REPLICAS, routing=Routing.AFFINITY, seed=seed)
    outcomes = [
        Outcome.of(each, Routing.AFFINITY, capacity=_REPLICAS * limits.max_ongoing_requests, overhead=0.0)
        for each in (live.served, simulated)
    ]
    rows = compare(*outcomes)
    for name, (measured, predicted) in rows.items():
        print(f"{name:22s} measured {measured:8.3f}  predicted {predicted:8.3f}  {predicted / measured - 1:+6.1%}")
    return {
        "model": model.name,
        "rate": rate,
        "requests": len(traffic.arrivals),
        "rows": {name: {"measured": a, "predicted": b} for name, (a, b) in rows.items()},
        "measured": asdict(outcomes[0]),
        "predicted": asdict(outcomes[1]),
        "profile": profile.model_dump(mode="json"),
    }


def _tiny() -> Path:
    """Return a model whose steps take a millisecond or two, for a quick look: what they wait for each other counts."""
    folder = CACHE / "tiny" / "base"
    return folder if folder.is_dir() else tiny(folder.parent)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Check, write the result, and return 1 when a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"a model folder, or tiny, {', '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=150.0, help="of traffic")
    parser.add_argument("--load", type=float, default=0.25, help="of what replicas do that answer one at a time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = {"tiny": _tiny, **MODELS}
    model = known[options.model]() if options.model in known else Path(options.model)
    with tempfile.TemporaryDirectory() as folder:
        found = check(model, Path(folder), seconds=options.seconds, load=options.load, seed=options.seed)
    print(write_results(f"plan_check-{options.model}", found))
    rows = found["rows"]
    assert isinstance(rows, dict), "by name"
    wrong = [name for name, row in rows.items() if abs(row["predicted"] / row["measured"] - 1) > _TOLERANCE]
    if wrong:
        print(f"off by more than {_TOLERANCE:.0%}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
