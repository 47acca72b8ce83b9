"""Holdings: what one router knows of its replicas: the adapters that they hold, and the requests that it has sent them.

    reported    by the replica itself, a moment ago
    believed    a request for the adapter was sent there lately: it is there, or is being brought in
    ongoing     it has taken the request
    intended    the request is about to be sent there

A belief bridges the time until a report can know of it, so that requests for a cold adapter that come together do not
bring it in everywhere; an intention that until the replica has answered, so that requests that come together do not
all see the same load. Knows no Ray; what is preferred is `routing_policy`'s business.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ovms_lora.scale.routing_policy import ReplicaState

BELIEF_SECONDS = 5.0
INTENTION_SECONDS = 2.0  # of a request that was never sent nobody says that it has ended
_MAX_BELIEFS = 1024


def key_of(aliases: Iterable[str]) -> str:
    """Return the multiplexed model id of a request for these adapters together; empty for none."""
    return ",".join(sorted(set(aliases)))


def aliases_of(key: str) -> frozenset[str]:
    """Return the adapters that a multiplexed model id names."""
    return frozenset(key.split(",")) if key else frozenset()


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself."""

    adapters: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()

    def as_stats(self) -> dict[str, Any]:
        """Return it as Serve carries it."""
        return {"adapters": sorted(self.adapters), "models": sorted(self.models)}

    @classmethod
    def of_stats(cls, stats: Mapping[str, Any]) -> Report:
        """Return what `as_stats` gave; before the first report nothing is known."""
        return cls(frozenset(stats.get("adapters", ())), frozenset(stats.get("models", ())))


@dataclass(slots=True)
class _Known:
    stats: Mapping[str, Any] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    ongoing: set[str] = field(default_factory=set)
    beliefs: OrderedDict[str, float] = field(default_factory=OrderedDict)  # alias: until when, oldest first

    def holds(self, now: float) -> frozenset[str]:
        while self.beliefs and next(iter(self.beliefs.values())) <= now:
            self.beliefs.popitem(last=False)
        return self.report.adapters.union(self.beliefs) if self.beliefs else self.report.adapters


class Holdings:
    """Belongs to one event loop. A replica has `room` while it has fewer than `target` requests."""

    def __init__(self, target: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._clock = clock
        self._known: dict[str, _Known] = {}
        # request: replica, until when; oldest first
        self._intended: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def report(self, replica: str, stats: Mapping[str, Any]) -> None:
        """Take a replica's own word; the same object as before is not read again."""
        known = self._of(replica)
        if known.stats is not stats:
            known.stats, known.report = stats, Report.of_stats(stats)

    def keep(self, replicas: Iterable[str]) -> None:
        """Forget all other replicas."""
        kept = set(replicas)
        self._known = {name: known for name, known in self._known.items() if name in kept}

    def is_model(self, name: str) -> bool:
        """Whether some replica serves a base of this name: requests for it are for no adapter."""
        return any(name in known.report.models for known in self._known.values())

    def believe(self, replica: str, key: str) -> None:
        """Expect a replica to hold the adapters of a request that goes there."""
        beliefs, until = self._of(replica).beliefs, self._clock() + BELIEF_SECONDS
        for alias in aliases_of(key):
            beliefs[alias] = until
            beliefs.move_to_end(alias)
        while len(beliefs) > _MAX_BELIEFS:
            beliefs.popitem(last=False)

    def intend(self, replica: str, request: str) -> None:
        """Count a request that is to be sent to a replica, until it begins or ends, but not for long."""
        self._intended[request] = replica, self._clock() + INTENTION_SECONDS
        self._intended.move_to_end(request)

    def begin(self, replica: str, request: str) -> None:
        """Count a request that a replica has taken."""
        self._intended.pop(request, None)
        self._of(replica).ongoing.add(request)

    def end(self, replica: str, request: str) -> None:
        """Count it no more; for one that was not counted it does nothing."""
        self._intended.pop(request, None)
        if known := self._known.get(replica):
            known.ongoing.discard(request)

    def states(self, key: str, queue_lengths: Mapping[str, int]) -> list[ReplicaState]:
        """Return the replicas as the policy sees them for one request; `queue_lengths` has what all routers sent them.

        When none has room, all may have one share more: so the order still counts under overload, within bounds.
        """
        now, wanted = self._clock(), aliases_of(key)
        while self._intended and next(iter(self._intended.values()))[1] <= now:
            self._intended.popitem(last=False)
        intended = Counter(replica for replica, _ in self._intended.values())
        loads = {
            name: max(len(self._of(name).ongoing) + intended[name], length) for name, length in queue_lengths.items()
        }
        room = self._target * (min(loads.values(), default=0) // self._target + 1)
        states = []
        for name, load in loads.items():
            held = self._known[name].holds(now)
            if len(wanted) > 1 and wanted <= held:
                held |= {key}
            states.append(ReplicaState(name, held, load, room))
        return states

    def _of(self, replica: str) -> _Known:
        return self._known.setdefault(replica, _Known())
