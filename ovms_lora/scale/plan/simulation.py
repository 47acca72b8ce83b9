"""The simulation: traffic, a router and replicas; from the first arrival until the last answer has ended.

The router sends each request on at once where a replica has room, and else keeps it in the order of arrival, as Ray
Serve does. It sees at once what replicas hold and have to do; a real router hears of it a little later.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from ovms_lora.scale.plan.agenda import Agenda
from ovms_lora.scale.plan.fleet import SimulatedFleet
from ovms_lora.scale.plan.replica import Record, ReplicaLimits, SimulatedReplica
from ovms_lora.scale.plan.replica_profile import ReplicaProfile
from ovms_lora.scale.plan.step_costs import StepCosts
from ovms_lora.scale.plan.workload import BASE, Traffic
from ovms_lora.scale.routing_policy import choose


class Routing(StrEnum):
    """How the router chooses."""

    AFFINITY = "affinity"  # by `routing_policy`
    RANDOM = "random"  # any replica with room


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was simulated. `queued` requests were at the router when the last one came; all were answered later."""

    traffic: Traffic
    record: Record
    busy_seconds: list[float]
    queued: int


def simulate(
    profile: ReplicaProfile, limits: ReplicaLimits, traffic: Traffic, *, replicas: int, routing: Routing, seed: int = 0
) -> Simulated:
    """Answer the traffic with so many replicas. Raises PlanError when the profile does not reach so far."""
    return _Simulation(profile, limits, traffic, replicas, routing, random.Random(seed)).run()


class _Simulation:
    def __init__(
        self,
        profile: ReplicaProfile,
        limits: ReplicaLimits,
        traffic: Traffic,
        replicas: int,
        routing: Routing,
        rng: random.Random,
    ) -> None:
        self._traffic, self._routing, self._rng = traffic, routing, rng
        self._record = Record.of(len(traffic.arrivals))
        self._agenda = Agenda()
        self._queue: deque[int] = deque()
        self._fleet = SimulatedFleet(replicas, len(traffic.ranks), max_ongoing=limits.max_ongoing_requests)
        costs = StepCosts.of(
            profile,
            rows=limits.max_num_seqs,
            adapters=min(limits.max_loras, len(traffic.ranks)),
            tokens=profile.max_num_batched_tokens,
        )
        self._replicas = [
            SimulatedReplica(
                number,
                profile,
                costs,
                limits,
                traffic,
                self._record,
                self._agenda,
                self._finished,
                partial(self._fleet.lost, number),
            )
            for number in range(replicas)
        ]

    def run(self) -> Simulated:
        agenda = self._agenda
        for request, time in enumerate(self._traffic.arrivals):
            while agenda.next_time <= time:
                agenda.run_next()
            self._queue.append(request)
            for replica in self._send(time):
                replica.wake(time)
        queued = len(self._queue)
        while agenda.next_time < float("inf"):
            agenda.run_next()
        busy = [replica.busy_seconds for replica in self._replicas]
        return Simulated(self._traffic, self._record, busy, queued)

    def _finished(self, replica: SimulatedReplica, requests: list[int], now: float) -> None:
        for _ in requests:
            self._fleet.ended(replica.number)
        for other in self._send(now):
            if other is not replica:  # that one begins its next step anyway
                other.wake(now)

    def _send(self, now: float) -> list[SimulatedReplica]:
        """Send on what is queued as long as there is room; return the replicas that got something."""
        sent: dict[int, SimulatedReplica] = {}
        while self._queue:
            request = self._queue[0]
            adapter = self._traffic.adapters[request]
            number = self._choose(None if adapter == BASE else adapter)
            if number is None:
                break
            self._queue.popleft()
            self._fleet.sent(number, None if adapter == BASE else adapter)
            self._replicas[number].arrive(request, now)
            sent[number] = self._replicas[number]
        return list(sent.values())

    def _choose(self, adapter: int | None) -> int | None:
        if self._routing is Routing.AFFINITY:
            return choose(self._fleet, adapter, self._rng)
        room = self._fleet.with_room()
        return room[int(self._rng.random() * len(room))] if room else None
