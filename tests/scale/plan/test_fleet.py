"""What the fleet keeps up to date is what a look at all replicas would find."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ovms_lora.scale.plan.fleet import SimulatedFleet
from ovms_lora.scale.routing_policy import KnownReplicas, ReplicaState

REPLICAS, ADAPTERS, ROOM = 4, 5, 3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_answer_is_that_of_a_linear_search(seed: int) -> None:
    rng = random.Random(seed)
    fleet = SimulatedFleet(REPLICAS, ADAPTERS, max_ongoing=ROOM)
    ongoing = [0] * REPLICAS
    held: list[set[int]] = [set() for _ in range(REPLICAS)]
    for _ in range(60):
        replica, adapter = rng.randrange(REPLICAS), rng.choice([None, *range(ADAPTERS)])
        if rng.random() < 0.5 and ongoing[replica] < ROOM:
            fleet.sent(replica, adapter)
            ongoing[replica] += 1
            held[replica] |= set() if adapter is None else {adapter}
        elif rng.random() < 0.6 and ongoing[replica]:
            fleet.ended(replica)
            ongoing[replica] -= 1
        elif adapter in held[replica]:
            fleet.lost(replica, adapter)
            held[replica].remove(adapter)
        states = [ReplicaState(str(i), frozenset(map(str, held[i])), ongoing[i], ROOM) for i in range(REPLICAS)]
        known = KnownReplicas(states)

        def numbers(found: list[ReplicaState]) -> list[int]:
            return [int(state.replica_id) for state in found]

        assert sorted(fleet.with_room()) == numbers(known.with_room())
        assert sorted(fleet.with_fewest_adapters()) == numbers(known.with_fewest_adapters())
        for each in range(ADAPTERS):
            assert sorted(fleet.holders(each)) == numbers(known.holders(str(each)))
        assert [fleet.ongoing(i) for i in range(REPLICAS)] == ongoing
