"""Work that several ask for is done once."""

from __future__ import annotations

import threading

import pytest

from ovms_lora.adapters.single_flight import SingleFlight
from ovms_lora.core.errors import UnavailableError


def test_who_asks_while_it_flies_gets_the_same_answer() -> None:
    flight, gate, runs = SingleFlight(), threading.Event(), []

    def work() -> int:
        gate.wait(5)
        runs.append(1)
        return len(runs)

    first = flight.run("key", work)
    others = [flight.run("key", work) for _ in range(20)]
    gate.set()
    assert {future.result(5) for future in (first, *others)} == {1}
    assert flight.run("key", work).result(5) == 2


def test_a_failure_is_everybody_s_and_is_not_kept() -> None:
    flight, gate = SingleFlight(), threading.Event()

    def fail() -> int:
        gate.wait(5)
        raise UnavailableError("down")

    futures = [flight.run("key", fail) for _ in range(3)]
    gate.set()
    for future in futures:
        with pytest.raises(UnavailableError, match="down"):
            future.result(5)
    assert flight.run("key", lambda: 1).result(5) == 1


def test_too_much_at_once_is_refused() -> None:
    flight, gate = SingleFlight(most=2), threading.Event()
    futures = [flight.run(key, lambda: gate.wait(5)) for key in ("one", "two")]
    with pytest.raises(UnavailableError, match="too many"):
        flight.run("three", lambda: gate.wait(5))
    gate.set()
    assert all(future.result(5) for future in futures)
