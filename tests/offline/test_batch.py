"""Outputs reach the call that waits for them; what a call leaves behind is dropped. The rest: tests/test_llm.py."""

from __future__ import annotations

import queue

from ovms_lora.core.request import SequenceOutput
from ovms_lora.offline.batch import Mailbox, OutputRouter

A1, A2, B1 = SequenceOutput("a1", 0), SequenceOutput("a2", 0), SequenceOutput("b1", 0)


def test_each_mailbox_gets_its_outputs_of_a_step_at_once() -> None:
    a: Mailbox = queue.SimpleQueue()
    b: Mailbox = queue.SimpleQueue()
    router = OutputRouter()
    for request_id, mailbox in (("a1", a), ("a2", a), ("b1", b)):
        router.open(request_id, mailbox)
    router([A1, B1, A2])
    assert (a.get_nowait(), b.get_nowait()) == ([A1, A2], [B1])
    assert a.empty()
    assert b.empty()


def test_outputs_that_nobody_waits_for_are_dropped() -> None:
    mailbox: Mailbox = queue.SimpleQueue()
    router = OutputRouter()
    router.open("a1", mailbox)
    router.close("a1")
    router.close("a1")
    router([A1, B1])
    assert mailbox.empty()
