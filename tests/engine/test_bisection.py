"""Whoever makes a step fail is found in few runs, and everybody else keeps their logits."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovms_lora.core.errors import EngineError
from ovms_lora.engine.bisection import StepResult, run_step
from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence
from tests.engine.harness import request
from tests.fakes import FakeRunner

WIDTH = 4


class RowRunner(FakeRunner):
    """Gives rows that name their sequence, in one array that the next call overwrites; fails with the guilty."""

    vocab_size = WIDTH

    def __init__(self, fails: Callable[[list[int]], bool]) -> None:
        super().__init__()
        self.runs: list[list[int]] = []
        self._fails = fails
        self._buffer = np.zeros((1024, WIDTH), np.float32)

    def run(self, chunks: Collection[Chunk]) -> FloatArray:
        numbers = [number_of(chunk) for chunk in chunks]
        self.runs.append(numbers)
        if self._fails(numbers):
            raise EngineError(f"failed with {numbers}")
        rows = [number for chunk in chunks for number in [number_of(chunk)] * chunk.num_sampled]
        self._buffer[: len(rows)] = np.array(rows)[:, None]
        return self._buffer[: len(rows)]


def number_of(chunk: Chunk) -> int:
    return int(chunk.sequence.request.request_id)


def chunks_of(adapters: list[str]) -> list[Chunk]:
    """One chunk per sequence, with 0 … 3 rows each."""
    sequences = [Sequence(request(str(i), adapter=adapter), 0) for i, adapter in enumerate(adapters)]
    return [Chunk(sequence, 0, 5, number % 4) for number, sequence in enumerate(sequences)]


def check_rows(step: StepResult) -> None:
    wanted = [number for chunk in step.chunks for number in [number_of(chunk)] * chunk.num_sampled]
    assert step.logits.shape == (len(wanted), WIDTH)
    assert step.logits[:, 0].tolist() == wanted


@given(guilty=st.sets(st.integers(0, 63), max_size=3), count=st.integers(1, 64), adapters=st.integers(1, 9))
def test_the_guilty_fail_and_nobody_else(guilty: set[int], count: int, adapters: int) -> None:
    chunks = chunks_of([f"a{i % adapters}" for i in range(count)])
    runner = RowRunner(lambda numbers: bool(guilty.intersection(numbers)))
    step = run_step(runner, chunks)
    present = {number for number in guilty if number < count}
    assert {int(name) for name in step.failures} == present
    assert [number_of(chunk) for chunk in step.chunks] == [i for i in range(count) if i not in present]
    check_rows(step)


@pytest.mark.parametrize("place", [0, 100, 255])
def test_one_culprit_costs_two_runs_per_level(place: int) -> None:
    runner = RowRunner(lambda numbers: place in numbers)
    step = run_step(runner, chunks_of([""] * 256))
    assert set(step.failures) == {str(place)}
    assert len(runner.runs) <= 1 + 2 * 8


def test_an_adapter_that_fails_with_everyone_costs_only_its_own_users() -> None:
    adapters = [f"a{i % 5}" for i in range(256)]
    runner = RowRunner(lambda numbers: any(adapters[number] == "a3" for number in numbers))
    step = run_step(runner, chunks_of(adapters))
    assert {adapters[int(name)] for name in step.failures} == {"a3"}
    assert {adapters[number_of(chunk)] for chunk in step.chunks} == {"a0", "a1", "a2", "a4"}
    check_rows(step)


def test_a_device_that_always_fails_is_not_asked_for_ever() -> None:
    runner = RowRunner(lambda _: True)
    step = run_step(runner, chunks_of([""] * 256))
    assert len(step.failures) == 256
    assert step.logits.shape == (0, WIDTH)
    assert len(runner.runs) < 100


def test_too_large_a_step_is_done_in_parts() -> None:
    runner = RowRunner(lambda numbers: len(numbers) > 10)
    step = run_step(runner, chunks_of([""] * 64))
    assert not step.failures
    check_rows(step)


def test_a_request_fails_with_all_its_sequences() -> None:
    both = [Sequence(request("7", n=2), index) for index in range(2)]
    chunks = [*chunks_of(["", ""]), *(Chunk(sequence, 0, 5, 1) for sequence in both)]
    runner = RowRunner(lambda numbers: 7 in numbers)
    step = run_step(runner, chunks)
    assert set(step.failures) == {"7"}
    assert [number_of(chunk) for chunk in step.chunks] == [0, 1]
    check_rows(step)


def test_a_sequence_that_fails_alone_is_not_tried_again() -> None:
    runner = RowRunner(lambda _: True)
    assert set(run_step(runner, chunks_of([""])).failures) == {"0"}
    assert len(runner.runs) == 1
