"""Requests go to a holder with room, else where few adapters are, else to the less loaded of two."""

from __future__ import annotations

import random
from collections import Counter

from ovms_lora.scale.routing_policy import KnownReplicas, ReplicaState, choose, preferences


def replica(name: str, *adapters: str, ongoing: int = 0, max_ongoing: int = 4) -> ReplicaState:
    return ReplicaState(name, frozenset(adapters), ongoing, max_ongoing)


def chosen(states: list[ReplicaState], adapter: str | None, seed: int = 0) -> str | None:
    found = choose(KnownReplicas(states), adapter, random.Random(seed))
    return found.replica_id if found else None


def often(states: list[ReplicaState], adapter: str | None, times: int = 2000) -> Counter[str | None]:
    return Counter(chosen(states, adapter, seed) for seed in range(times))


def test_a_holder_with_room_gets_the_request_though_others_are_idle() -> None:
    states = [replica("a"), replica("b", "sql", ongoing=3), replica("c")]
    assert set(often(states, "sql", 50)) == {"b"}


def test_a_full_holder_is_passed_for_the_replica_with_the_fewest_adapters() -> None:
    states = [replica("a", "x", "y"), replica("b", "sql", ongoing=4), replica("c", "x", ongoing=3)]
    assert set(often(states, "sql", 50)) == {"c"}


def test_fewest_adapters_are_counted_among_those_with_room() -> None:
    states = [replica("empty", ongoing=4), replica("a", "x", "y"), replica("b", "x")]
    assert chosen(states, "sql") == "b"


def test_a_request_of_the_base_goes_anywhere() -> None:
    states = [replica("a", "x"), replica("b"), replica("c", "y", "z")]
    found = often(states, None)
    assert all(found[name] > 500 for name in "abc")


def test_of_two_drawn_the_less_loaded_one_is_taken() -> None:
    states = [replica("a", ongoing=3), replica("b", ongoing=0), replica("c", ongoing=1)]
    found = often(states, None)
    # b is in two of the three pairs, c beats a in the third, and a beats nobody.
    assert set(found) == {"b", "c"}
    assert 0.62 < found["b"] / 2000 < 0.71


def test_nobody_is_chosen_when_all_are_full() -> None:
    states = [replica("a", "sql", ongoing=4), replica("b", ongoing=4)]
    assert chosen(states, "sql") is None
    assert chosen(states, None) is None
    assert chosen([], None) is None


def test_ranks_come_in_order_and_hold_two_replicas_at_most() -> None:
    states = [replica(f"h{i}", "sql", "x") for i in range(3)] + [replica(f"e{i}", ongoing=i) for i in range(3)]
    ranks = list(preferences(KnownReplicas(states), "sql", random.Random(1)))
    assert [len(rank) for rank in ranks] == [2, 2, 2]
    assert all("sql" in state.adapters for state in ranks[0])
    assert all(not state.adapters for state in ranks[1])
    assert all(rank[0].ongoing <= rank[1].ongoing and rank[0] != rank[1] for rank in ranks)
