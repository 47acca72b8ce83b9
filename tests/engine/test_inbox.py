"""The inbox: what is taken, what is refused, and that nobody is left waiting for it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from ovms_lora.core.errors import EngineError, InvalidFieldError, OvmsLoraError, QueueFullError, UnavailableError
from ovms_lora.engine.inbox import Inbox
from ovms_lora.engine.waiting_queue import Backlog
from tests.engine.harness import eventually, request


def test_what_comes_is_taken_in_order() -> None:
    inbox, first, second = Inbox(8), request("1"), request("2")
    inbox.submit(first)
    inbox.cancel("x")
    inbox.submit(second)
    assert inbox.num_requests == 2
    assert inbox.take(idle=True) == [first, "x", second]
    assert (inbox.num_requests, inbox.take(idle=False)) == (0, [])


def test_requests_count_here_and_behind() -> None:
    inbox = Inbox(3)
    inbox.submit(request("1"), behind=Backlog(2))
    for waiting in (2, 5):
        with pytest.raises(QueueFullError, match="3 requests are waiting"):
            inbox.submit(request("2"), behind=Backlog(waiting))
    inbox.cancel("1")  # cancellations always have room
    inbox.submit(request("2"), behind=Backlog(1))


def test_sequences_are_bounded_too() -> None:
    inbox = Inbox(256)
    inbox.submit(request("1", n=128), behind=Backlog(0, 4096 - 2 * 128))
    with pytest.raises(QueueFullError, match="4096 sequences"):
        inbox.submit(request("2", n=128), behind=Backlog(0, 4096 - 2 * 128 + 1))
    inbox.submit(request("2", n=128), behind=Backlog(0, 4096 - 2 * 128))


@pytest.mark.parametrize(("own", "fits"), [(0, True), (1, True), (2, False), (3, False)])
def test_an_owner_has_its_share_of_the_queue(own: int, fits: bool) -> None:
    inbox = Inbox(8)
    inbox.submit(replace(request("1"), owner="a", queue_share=0.5), behind=Backlog(own), own=Backlog(own))
    inbox.submit(replace(request("2"), owner="b", queue_share=0.5), behind=Backlog(own), own=Backlog())
    third = replace(request("3"), owner="a", queue_share=0.38)
    if fits:
        inbox.submit(third, behind=Backlog(own), own=Backlog(own))
    else:
        with pytest.raises(QueueFullError, match="3 requests of yours are waiting already"):
            inbox.submit(third, behind=Backlog(own), own=Backlog(own))
    inbox.submit(request("4"), behind=Backlog(own), own=Backlog())


def test_an_owner_with_the_smallest_share_can_still_ask() -> None:
    inbox = Inbox(8)
    inbox.submit(replace(request("1", n=128), owner="a", queue_share=0.001))
    with pytest.raises(QueueFullError, match="1 requests of yours"):
        inbox.submit(replace(request("2"), owner="a", queue_share=0.001))


def test_the_sequences_of_an_owner_are_bounded_too() -> None:
    inbox, wide = Inbox(256), replace(request("1", n=128), owner="a", queue_share=0.5)
    with pytest.raises(QueueFullError, match="2048 sequences of yours"):
        inbox.submit(wide, behind=Backlog(2, 2000), own=Backlog(2, 2048 - 127))
    inbox.submit(wide, behind=Backlog(2, 2000), own=Backlog(2, 2048 - 128))


def test_an_id_is_taken_until_its_request_has_ended() -> None:
    inbox = Inbox(8)
    inbox.submit(request("r"))
    inbox.take(idle=False)
    with pytest.raises(InvalidFieldError) as refused:
        inbox.submit(request("r"))
    assert refused.value.param == "request_id"
    inbox.ended("r")
    inbox.ended("r")
    inbox.submit(request("r"))


def test_a_refused_request_leaves_its_id_free() -> None:
    inbox = Inbox(1)
    with pytest.raises(QueueFullError):
        inbox.submit(request("r"), behind=Backlog(1))
    inbox.submit(request("r"))


def test_the_requests_of_a_call_are_taken_together_or_not_at_all() -> None:
    inbox, two = Inbox(4), [request("1"), request("2")]
    shared = [replace(each, owner="a", queue_share=0.5) for each in two]
    for refused, behind, own, why in (
        (two, Backlog(3), Backlog(), "more than 4 requests would wait with the 2 of this call"),
        (shared, Backlog(1), Backlog(1), "more than 2 requests of yours would wait with the 2"),
        ([request(name, n=2048) for name in "12"], Backlog(1, 1), Backlog(), "4096 sequences"),
    ):
        with pytest.raises(QueueFullError, match=why):
            inbox.submit(*refused, behind=behind, own=own)
    inbox.submit(request("x"))
    with pytest.raises(InvalidFieldError, match="the id x runs"):
        inbox.submit(request("1"), request("x"))
    assert inbox.num_requests == 1
    inbox.submit(*two, request("3"))
    assert inbox.num_requests == 4


def test_a_request_that_is_cancelled_before_it_is_taken_leaves_its_room() -> None:
    inbox, other = Inbox(2), request("2")
    inbox.submit(request("1"), other)
    inbox.cancel("1")
    inbox.submit(again := request("1"))
    assert inbox.take(idle=False) == [other, again]
    inbox.cancel("1")
    assert inbox.take(idle=False) == ["1"]


def test_a_closed_or_failed_inbox_says_why() -> None:
    inbox = Inbox(8)
    inbox.close()
    with pytest.raises(UnavailableError):
        inbox.submit(request())
    with pytest.raises(UnavailableError):
        inbox.call(lambda: 1)
    inbox.fail(EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        inbox.submit(request())


def called(inbox: Inbox, work: object) -> tuple[threading.Thread, list[object]]:
    """Call from another thread; return it, and where its result or error will stand."""
    results: list[object] = []

    def call() -> None:
        try:
            results.append(inbox.call(work))  # type: ignore[arg-type]
        except OvmsLoraError as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: bool(inbox._tasks))
    return thread, results


def test_a_task_gives_its_result_or_its_error() -> None:
    inbox = Inbox(8)
    for work, expected in ((lambda: 5, 5), (lambda: inbox.submit(request(), behind=Backlog(99)), QueueFullError)):
        thread, results = called(inbox, work)
        inbox.run_tasks()
        thread.join()
        assert results[0] == expected or isinstance(results[0], expected)  # type: ignore[arg-type]


def test_emptying_answers_tasks_and_hands_back_requests() -> None:
    inbox, each = Inbox(8), request()
    inbox.submit(each)
    inbox.cancel("x")
    thread, results = called(inbox, lambda: 5)
    error = UnavailableError("stopped")
    assert inbox.empty(error) == [each]
    thread.join()
    assert results == [error]
    assert inbox.closed
