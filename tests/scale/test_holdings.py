"""What a router knows: reports, beliefs until a report can know better, and requests that are under way."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

from ovms_lora.scale.holdings import BELIEF_SECONDS, INTENTION_SECONDS, Holdings, Report, aliases_of, key_of
from ovms_lora.scale.routing_policy import KnownReplicas, choose

TARGET = 2


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chosen(holdings: Holdings, key: str, lengths: Mapping[str, int]) -> str | None:
    found = choose(KnownReplicas(holdings.states(key, lengths)), key or None, random.Random(1))
    return found.replica_id if found else None


def reporting(**adapters: set[str]) -> Holdings:
    holdings = Holdings(TARGET, Clock())
    for name, held in adapters.items():
        holdings.report(name, Report(frozenset(held), frozenset({"base"})).as_stats())
    return holdings


def test_a_key_names_each_adapter_once_in_one_order() -> None:
    assert key_of(["sql", "mail", "sql"]) == "mail,sql"
    assert aliases_of("mail,sql") == {"mail", "sql"}
    assert aliases_of(key_of([])) == frozenset()


def test_what_a_replica_reports_it_holds() -> None:
    holdings = reporting(a=set(), b={"sql"})
    assert chosen(holdings, "sql", {"a": 0, "b": 1}) == "b"
    assert holdings.is_model("base")
    assert not holdings.is_model("sql")


def test_before_the_first_report_nothing_is_known() -> None:
    holdings = Holdings(TARGET)
    holdings.report("a", {})
    assert holdings.states("sql", {"a": 0})[0].adapters == frozenset()


def test_where_a_request_was_sent_its_adapter_is_believed_to_be_for_a_while() -> None:
    clock = Clock()
    holdings = Holdings(TARGET, clock)
    holdings.believe("b", "sql")
    assert {chosen(holdings, "sql", {"a": 0, "b": 1}) for _ in range(9)} == {"b"}
    clock.now = BELIEF_SECONDS
    assert not any(state.adapters for state in holdings.states("sql", {"a": 0, "b": 0}))


def test_beliefs_count_when_the_fewest_adapters_are_looked_for() -> None:
    holdings = reporting(a=set(), b=set())
    holdings.believe("a", "sql")
    assert chosen(holdings, "mail", {"a": 0, "b": 0}) == "b"


def test_a_blend_goes_where_all_its_adapters_are() -> None:
    holdings = reporting(a={"sql"}, b={"mail", "sql"}, c={"mail"})
    assert chosen(holdings, key_of(["sql", "mail"]), {"a": 0, "b": 1, "c": 0}) == "b"


def test_requests_under_way_take_room() -> None:
    holdings = reporting(a={"sql"}, b=set())
    holdings.begin("a", "1")
    assert chosen(holdings, "sql", {"a": 0, "b": 0}) == "a"
    holdings.begin("a", "2")
    assert chosen(holdings, "sql", {"a": 0, "b": 0}) == "b"
    holdings.end("a", "1")
    holdings.end("gone", "1")
    assert chosen(holdings, "sql", {"a": 0, "b": 0}) == "a"


def test_requests_about_to_be_sent_take_room_until_they_begin_end_or_are_forgotten() -> None:
    clock = Clock()
    holdings = Holdings(TARGET, clock)

    def load() -> int:
        return holdings.states("", {"a": 0})[0].ongoing

    for request in "12":
        holdings.intend("a", request)
    assert load() == 2
    holdings.begin("a", "1")
    assert load() == 2
    holdings.end("a", "1")
    holdings.end("a", "2")  # it broke off before it was taken
    assert load() == 0
    holdings.intend("a", "3")
    holdings.intend("b", "3")  # another try
    assert load() == 0
    holdings.intend("a", "4")
    clock.now = INTENTION_SECONDS
    assert load() == 0


def test_requests_that_come_together_are_shared_evenly() -> None:
    holdings = reporting(a=set(), b=set())
    sent = Counter[str]()
    for request in range(2 * TARGET):
        replica = chosen(holdings, "", {"a": 0, "b": 0})
        assert replica
        holdings.intend(replica, str(request))
        sent[replica] += 1
    assert set(sent.values()) == {TARGET}


def test_requests_of_other_routers_take_room_too() -> None:
    assert chosen(reporting(a={"sql"}, b=set()), "sql", {"a": TARGET, "b": 0}) == "b"


def test_when_all_are_full_each_may_have_one_share_more() -> None:
    holdings = reporting(a={"sql"}, b=set())
    assert chosen(holdings, "sql", {"a": TARGET + 1, "b": TARGET}) == "a"
    assert chosen(holdings, "sql", {"a": 2 * TARGET, "b": TARGET}) == "b"


def test_what_is_gone_is_forgotten() -> None:
    holdings = reporting(a={"sql"}, b=set())
    holdings.keep(["b"])
    assert [state.replica_id for state in holdings.states("sql", {"b": 0})] == ["b"]
