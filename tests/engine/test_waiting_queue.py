"""The waiting queue: owners and adapters take turns, nobody starves, and the numbers are right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.waiting_queue import Backlog, WaitingQueue
from tests.engine.harness import request

_NUMBERS = iter(range(10**9))


def sequence(name: str) -> Sequence:
    """Return a sequence of an owner and an adapter, written `owner/adapter`; the name serves to recognise it."""
    owner, _, adapter = name.partition("/")
    return Sequence(replace(request(f"{name}#{next(_NUMBERS)}", adapter=adapter), owner=owner), 0)


def queue_of(*names: str) -> WaitingQueue:
    queue = WaitingQueue()
    for name in names:
        queue.add(sequence(name))
    return queue


def names(queue: WaitingQueue) -> list[str]:
    return [waiting.request.request_id.partition("#")[0] for waiting in queue]


def admitted(queue: WaitingQueue, count: int) -> list[str]:
    return [queue.admit().request.request_id.partition("#")[0] for _ in range(count)]


def test_a_flow_alone_is_served_in_the_order_of_arrival() -> None:
    queue = queue_of(*["a"] * 5)
    assert [queue.admit().arrival for _ in range(5)] == [0, 1, 2, 3, 4]
    assert queue.first is None


def test_who_comes_after_a_flood_takes_turns_with_it() -> None:
    queue = queue_of(*["a"] * 6)
    assert admitted(queue, 2) == ["a", "a"]
    for _ in range(2):
        queue.add(sequence("b"))
    assert admitted(queue, 6) == ["b", "a", "b", "a", "a", "a"]


def test_adapters_take_turns_as_owners_do() -> None:
    queue = queue_of(*["/x"] * 4, "/y", "")
    assert admitted(queue, 6) == ["/x", "/y", "", "/x", "/x", "/x"]


def test_many_adapters_get_an_owner_no_more_than_others_have() -> None:
    queue = queue_of(*[f"a/{number}" for number in range(20)] * 3)
    for _ in range(10):
        queue.add(sequence("b"))
    counts = Counter(name.partition("/")[0] for name in admitted(queue, 20))
    assert counts["b"] == 10


def test_a_flow_that_was_away_has_no_claim_to_what_it_missed() -> None:
    queue = queue_of(*["a"] * 50)
    admitted(queue, 40)
    for _ in range(10):
        queue.add(sequence("b"))
    assert admitted(queue, 10).count("a") == 5


def test_a_flow_cannot_gain_by_asking_one_at_a_time() -> None:
    queue = queue_of(*["a"] * 50)
    seen = []
    for _ in range(20):
        if "b" not in names(queue):
            queue.add(sequence("b"))
        seen += admitted(queue, 1)
    assert seen.count("a") >= 9


def test_those_that_are_passed_by_keep_their_places() -> None:
    queue = queue_of("a", "b", "a")
    passed = [queue.pass_by(), queue.pass_by()]
    assert admitted(queue, 1) == ["a"]
    assert queue.first is None
    assert queue.backlog == Backlog(2, 2)
    queue.restore(passed)
    assert [queue.admit() for _ in range(2)] == passed[::-1]  # a has had a turn meanwhile


def test_preempted_sequences_go_first_in_the_order_of_arrival() -> None:
    queue = queue_of("a", "a", "b", "b")
    first, second = queue.admit(), queue.admit()
    queue.put_back(second)
    queue.put_back(first)
    assert [queue.admit(), queue.admit()] == [first, second]


@given(st.lists(st.sampled_from(["add", "admit", "remove", "put_back", "pass_by"]), max_size=60), st.data())
def test_the_numbers_are_those_of_the_order(actions: list[str], data: st.DataObject) -> None:
    queue = WaitingQueue()
    ran: list[Sequence] = []
    for action in actions:
        if action == "add":
            new = sequence(data.draw(st.sampled_from(["a", "a/x", "a/y", "b", "/x", ""])))
            for index in range(data.draw(st.integers(1, 3))):
                queue.add(Sequence(new.request, index))
        elif action == "put_back" and ran:
            queue.put_back(ran.pop())
        elif queue.first is None:
            continue
        elif action == "admit":
            ran.append(queue.admit())
        elif action == "remove":
            queue.remove(data.draw(st.sampled_from(list(queue))))
        elif action == "pass_by":
            queue.restore([queue.pass_by()])
        requests = {waiting.request.request_id: waiting.request.owner for waiting in queue}
        owners = Counter(waiting.request.owner for waiting in queue)
        assert queue.backlog == Backlog(len(requests), len(list(queue)))
        for owner in ("a", "b", ""):
            assert queue.backlog_of(owner) == Backlog(list(requests.values()).count(owner), owners[owner])
