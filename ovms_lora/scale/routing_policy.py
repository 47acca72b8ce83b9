"""The routing policy: which replicas a request may go to, the best ones first.

    1  holders         the replicas that hold the request's adapter
    2  fewest          the replicas with the fewest adapters: what is brought in there displaces least
    3  any             every replica; the first rank for a request without an adapter

Only replicas with room count. Of each rank two are drawn, and the one with fewer requests comes first (power of two
choices). The planner simulates with the very policy that routes. How replicas are reached, and how it is known what
they hold, is not known here.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Replica = TypeVar("Replica")
Adapter_contra = TypeVar("Adapter_contra", bound=Hashable, contravariant=True)


class Fleet(Protocol[Replica, Adapter_contra]):
    """What the policy asks. All answers are about replicas with room for one more request."""

    def holders(self, adapter: Adapter_contra) -> Sequence[Replica]:
        """Return the replicas that hold an adapter."""

    def with_fewest_adapters(self) -> Sequence[Replica]:
        """Return the replicas that hold as few adapters as any."""

    def with_room(self) -> Sequence[Replica]:
        """Return all of them."""

    def ongoing(self, replica: Replica) -> int:
        """Return how many requests a replica has, running and waiting."""


def preferences(
    fleet: Fleet[Replica, Adapter_contra], adapter: Adapter_contra | None, rng: random.Random
) -> Iterator[list[Replica]]:
    """Yield ranks of at most two replicas, best rank first, less loaded replica first; nothing when all are full.

    `adapter` is None for a request of the base. A rank may repeat replicas of one before it.
    """
    if adapter is not None:
        yield from _rank(fleet, fleet.holders(adapter), rng)
        yield from _rank(fleet, fleet.with_fewest_adapters(), rng)
    yield from _rank(fleet, fleet.with_room(), rng)


def choose(fleet: Fleet[Replica, Adapter_contra], adapter: Adapter_contra | None, rng: random.Random) -> Replica | None:
    """Return the replica that the policy prefers; None when none has room."""
    return next((rank[0] for rank in preferences(fleet, adapter, rng)), None)


def _rank(
    fleet: Fleet[Replica, Adapter_contra], candidates: Sequence[Replica], rng: random.Random
) -> Iterator[list[Replica]]:
    if len(candidates) > 2:
        first = int(rng.random() * len(candidates))
        second = int(rng.random() * (len(candidates) - 1))
        candidates = (candidates[first], candidates[second + (second >= first)])
    if candidates:
        yield sorted(candidates, key=fleet.ongoing)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a router knows of one replica: the adapters it holds, its requests, and how many it takes at once."""

    replica_id: str
    adapters: frozenset[str]
    ongoing: int
    max_ongoing: int

    @property
    def has_room(self) -> bool:
        """Whether one more request may be sent."""
        return self.ongoing < self.max_ongoing


class KnownReplicas:
    """A Fleet of the states that a router knows now."""

    def __init__(self, states: Sequence[ReplicaState]) -> None:
        self._with_room = [state for state in states if state.has_room]

    def holders(self, adapter: str) -> list[ReplicaState]:
        """Return the replicas that hold an adapter."""
        return [state for state in self._with_room if adapter in state.adapters]

    def with_fewest_adapters(self) -> list[ReplicaState]:
        """Return the replicas that hold as few adapters as any."""
        fewest = min((len(state.adapters) for state in self._with_room), default=0)
        return [state for state in self._with_room if len(state.adapters) == fewest]

    def with_room(self) -> list[ReplicaState]:
        """Return all of them."""
        return self._with_room

    def ongoing(self, replica: ReplicaState) -> int:
        """Return how many requests a replica has."""
        return replica.ongoing
