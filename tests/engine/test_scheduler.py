"""The scheduler over a fake device: nothing lost, nothing shared wrongly, nobody starved, the same tokens always."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ovms_lora.core.request import AdapterUse, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.beam import BeamSearch
from ovms_lora.engine.scheduler import NoAdapters, SchedulerLimits
from ovms_lora.engine.sequence import Sequence, SequenceStatus
from tests.engine.stepping import FakeAdapter, Stepper, results_alone, tokens_alone

LETTERS = [ord("a"), ord("b")]


def request(
    name: str = "r", prompt: list[int] | None = None, *, length: int = 4, adapter: str = "", salt: str = "", **kw: Any
) -> GenerationRequest:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **kw})
    adapters = (AdapterUse(FakeAdapter(adapter)),) if adapter else ()
    return GenerationRequest(name, tuple(prompt or [97] * length), sampling, adapters, salt)


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests over a pool that is too small for them; after every rule the books are right."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled: set[Sequence] = set()
        self.all: list[Sequence] = []
        self.searches: dict[BeamSearch, GenerationRequest] = {}

    @initialize(
        num_blocks=st.integers(2, 8),
        block_size=st.integers(2, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        split=st.booleans(),
        caching=st.booleans(),
        copies=st.booleans(),
    )
    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, split: bool, caching: bool, copies: bool
    ) -> None:
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            split_prefill=split,
            prefix_caching=caching,
            max_bypasses=2,
        )
        self.stepper = Stepper(limits, num_blocks=num_blocks, block_size=block_size, copies_blocks=copies)

    @rule(
        data=st.data(),
        n=st.integers(1, 3),
        seed=st.none() | st.integers(0, 3),
        asks_prompt=st.booleans(),
        adapter=st.sampled_from(["", "x", "y"]),
    )
    def add(self, data: st.DataObject, n: int, seed: int | None, asks_prompt: bool, adapter: str) -> None:
        room = self.stepper.pool.num_blocks * self.stepper.pool.block_size
        prompt = data.draw(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=room - 1))
        max_tokens = data.draw(st.integers(1, room - len(prompt)))
        temperature = 0.0 if seed is None else 1.0
        self.all += self.stepper.add(
            request(
                prompt=prompt,
                adapter=adapter,
                n=n,
                seed=seed,
                temperature=temperature,
                max_tokens=max_tokens,
                prompt_logprobs=0 if asks_prompt else None,
            )
        )

    @rule(data=st.data(), width=st.integers(2, 4), asks_prompt=st.booleans(), adapter=st.sampled_from(["", "x"]))
    def search(self, data: st.DataObject, width: int, asks_prompt: bool, adapter: str) -> None:
        room = self.stepper.pool.num_blocks * self.stepper.pool.block_size
        prompt = data.draw(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=room - 1))
        max_tokens = data.draw(st.integers(1, room - len(prompt)))
        prompt_logprobs = 0 if asks_prompt else None
        searching = request(
            prompt=prompt,
            adapter=adapter,
            n=width,
            beam_width=width,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
        )
        self.searches[self.stepper.search(searching)] = searching

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        for _ in range(count):
            chunks = self.stepper.step()
            assert chunks or not self.stepper.scheduler.has_work or self.stepper.scheduler.waiting

    @rule(data=st.data(), count=st.integers(1, 3))
    def step_with_drafts(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            before = [sequence for sequence in self.stepper.scheduler.running if sequence.num_pending == 1]
            preemptions = self.stepper.scheduler.num_preemptions
            chunks = self.stepper.step({sequence: self._draft(sequence, data) for sequence in before})
            if preemptions == self.stepper.scheduler.num_preemptions:
                parked = {sequence for sequence in before if sequence.parked}
                planned = {chunk.sequence for chunk in chunks}
                assert planned >= {s for s in before if s.status is SequenceStatus.RUNNING} - parked

    def _draft(self, sequence: Sequence, data: st.DataObject) -> tuple[int, ...]:
        """Guess some tokens rightly, then some wrongly."""
        sampling = sequence.request.sampling
        if sampling.beam_width > 1 or sequence.num_output == 0:
            return ()
        rest = data.draw(st.integers(0, 6))
        to_come = tokens_alone(sequence.request, sequence.index)[sequence.num_output :]
        right = to_come[:rest] if sampling.greedy or sampling.seed is not None else []
        wrong = [7] * data.draw(st.integers(0, 3))
        return tuple([*right, *wrong][: (sampling.max_tokens or 0) - sequence.num_output - 1])

    @rule(refusals=st.integers(1, 6))
    def have_no_room_for_adapters(self, refusals: int) -> None:
        self.stepper.residency.refusals = refusals

    @precondition(lambda self: self.stepper.scheduler.has_work)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        scheduler = self.stepper.scheduler
        sequence = data.draw(st.sampled_from([*scheduler.waiting, *scheduler.running]))
        self.cancelled.add(sequence)
        self.searches.pop(self.stepper.searches.get(sequence), None)  # type: ignore[arg-type]  # None is no key
        self.stepper.cancel(sequence)
        self.stepper.check_books()

    @rule()
    def finish_all(self) -> None:
        self.stepper.run_to_the_end()
        assert self.stepper.pool.num_free == self.stepper.pool.num_blocks
        for sequence in self.all:
            assert sequence.status is SequenceStatus.FINISHED
            if sequence not in self.cancelled:
                assert sequence.output_token_ids == tokens_alone(sequence.request, sequence.index)
        for search, searching in self.searches.items():
            assert self.stepper.found[search] == results_alone(searching)
        self.all.clear()
        self.searches.clear()

    def teardown(self) -> None:
        if hasattr(self, "stepper"):
            self.finish_all()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=30)


def stepper(*, num_blocks: int = 16, block_size: int = 4, **limits: Any) -> Stepper:
    return Stepper(SchedulerLimits(**limits), num_blocks=num_blocks, block_size=block_size)


def test_preempted_sequences_end_with_the_tokens_they_have_alone() -> None:
    tight = stepper(num_blocks=5)
    for number in range(4):
        tight.add(request(prompt=[97 + number] * 3, max_tokens=15))
    tight.run_to_the_end()
    assert tight.scheduler.num_preemptions > 0
    assert len(tight.finished) == 4
    for sequence in tight.finished:
        assert sequence.output_token_ids == tokens_alone(sequence.request, 0)


def test_the_youngest_is_preempted_and_the_oldest_ends_first() -> None:
    tight = stepper(num_blocks=4)
    first, second = (tight.add(request(prompt=[letter] * 4, max_tokens=12))[0] for letter in LETTERS)
    while not tight.scheduler.num_preemptions:
        tight.step()
    assert second.status is SequenceStatus.WAITING
    tight.run_to_the_end()
    assert tight.finished == [first, second]


def test_a_sequence_that_is_preempted_after_it_was_planned_is_taken_out_of_the_step() -> None:
    tight = stepper(num_blocks=5)
    old, young = (tight.add(request(prompt=[letter] * 4, max_tokens=12))[0] for letter in LETTERS)
    tight.residency.refusals = 1  # so the younger one is admitted, and planned, first
    tight.step()
    while not tight.scheduler.num_preemptions:
        assert tight.scheduler.running[:1] == [young]
        chunks = tight.step()
    assert [chunk.sequence for chunk in chunks] == [old]
    tight.run_to_the_end()
    assert young.output_token_ids == tokens_alone(young.request, 0)


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    mixed = stepper(max_num_batched_tokens=4)
    short = mixed.add(request(length=2, max_tokens=12))[0]
    mixed.step()
    long = mixed.add(request(prompt=[98] * 12))[0]
    plans = [[(chunk.sequence, chunk.count) for chunk in mixed.step()] for _ in range(4)]
    assert plans == [[(short, 1), (long, 3)]] * 4


def test_an_unsplit_prompt_longer_than_the_budget_runs_alone() -> None:
    whole = stepper(max_num_batched_tokens=4, split_prefill=False)
    short, long = whole.add(request(length=2, max_tokens=2)) + whole.add(request(prompt=[98] * 10))
    plans = [[(chunk.sequence, chunk.count) for chunk in whole.step()] for _ in range(3)]
    assert plans == [[(short, 2)], [(short, 1)], [(long, 10)]]


def test_a_right_draft_brings_all_its_tokens_and_one_more_in_one_step() -> None:
    drafting = stepper()
    (sequence,) = drafting.add(request(max_tokens=9))
    drafting.step()
    to_come = tuple(tokens_alone(sequence.request, 0)[1:6])
    (chunk,) = drafting.step({sequence: to_come})
    assert (chunk.count, chunk.num_sampled, chunk.draft) == (6, 6, to_come)
    assert sequence.output_token_ids == tokens_alone(sequence.request, 0)[:7]
    assert (sequence.num_computed, len(sequence.blocks)) == (sequence.num_tokens - 1, 3)


def test_of_a_wrong_draft_nothing_is_left() -> None:
    drafting = stepper(block_size=2)
    (sequence,) = drafting.add(request(max_tokens=9))
    drafting.step()
    right = tokens_alone(sequence.request, 0)
    drafting.step({sequence: (right[1], 7, right[3], right[4])})
    assert sequence.output_token_ids == right[:3]
    assert (sequence.num_computed, len(sequence.blocks)) == (6, 4)
    drafting.run_to_the_end()
    assert sequence.output_token_ids == right


def test_tokens_of_a_wrong_draft_are_found_by_no_prefix() -> None:
    caching = stepper(block_size=2)
    (sequence,) = caching.add(request(max_tokens=5))
    caching.step()
    caching.step({sequence: (7, 7, 7)})
    caching.run_to_the_end()
    (other,) = caching.add(request(prompt=[97] * 4 + sequence.output_token_ids[:1] + [7] * 4))
    caching.step()
    assert other.num_cached == 4


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"num_blocks": 16, "max_num_batched_tokens": 6}, [2, 4]),  # the prompt comes first
        ({"num_blocks": 16, "max_num_batched_tokens": 64}, [9, 4]),
        ({"num_blocks": 3}, [5, 4]),
    ],
)
def test_a_draft_gets_only_what_is_left_of_tokens_and_blocks(limits: dict[str, Any], expected: list[int]) -> None:
    tight = stepper(**limits)
    (sequence,) = tight.add(request(length=3, max_tokens=9))
    tight.step()
    (newcomer,) = tight.add(request(prompt=[98] * 4, max_tokens=1))
    chunks = tight.step({sequence: (7,) * 8})
    assert [chunk.sequence for chunk in chunks] == [sequence, newcomer]
    assert [chunk.count for chunk in chunks] == expected


def test_nobody_is_preempted_for_a_draft() -> None:
    tight = stepper(num_blocks=2)
    first, second = (tight.add(request(prompt=[letter] * 2, max_tokens=2))[0] for letter in LETTERS)
    tight.step()
    tight.step({first: (7,) * 8, second: (7,) * 8})
    assert tight.scheduler.num_preemptions == 0


def test_a_known_prefix_is_computed_once() -> None:
    caching = stepper()
    caching.add(request(length=10))
    caching.run_to_the_end()
    (again,) = caching.add(request(length=10))
    (chunk,) = caching.step()
    assert (chunk.start, chunk.count, again.num_cached) == (8, 2, 8)
    assert (caching.scheduler.blocks.prefix_queries, caching.scheduler.blocks.prefix_hits) == (20, 8)


def test_the_last_token_of_a_known_prompt_is_still_computed() -> None:
    caching = stepper()
    caching.add(request(length=8))
    caching.run_to_the_end()
    caching.add(request(length=8))
    (chunk,) = caching.step()
    assert (chunk.start, chunk.count, chunk.num_sampled) == (4, 4, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"adapter": "x"}),
        ({"adapter": "x"}, {"adapter": "y"}),
        ({"salt": "a"}, {"salt": "b"}),
        ({"salt": "x"}, {"adapter": "x"}),
        ({}, {"prompt_logprobs": 0}),
    ],
)
def test_a_prefix_is_not_shared_between(first: dict[str, Any], second: dict[str, Any]) -> None:
    caching = stepper()
    caching.add(request(length=10, **first))
    caching.run_to_the_end()
    (other,) = caching.add(request(length=10, **second))
    caching.step()
    assert other.num_cached == 0


def test_a_prefix_is_not_shared_between_strengths_of_one_adapter() -> None:
    keys = []
    for alpha in (1.0, 0.5, 1):
        used = GenerationRequest("r", (97,) * 4, SamplingParams(), (AdapterUse(FakeAdapter("x"), alpha),))
        keys.append(Sequence(used, 0).prefix_keys(1, 4)[0])
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_the_key_of_a_block_depends_on_all_blocks_before_it() -> None:
    def keys(prompt: str) -> list[bytes]:
        return Sequence(request(prompt=list(prompt.encode())), 0).prefix_keys(2, 4)

    assert keys("aaaabbbb")[1] != keys("ccccbbbb")[1]
    assert keys("aaaaaaaa")[0] != keys("aaaaaaaa")[1]
    assert keys("aaaabbbb")[0] == keys("aaaacccc")[0]


def test_without_prefix_caching_nothing_is_remembered() -> None:
    forgetful = stepper(prefix_caching=False)
    forgetful.add(request(length=10))
    forgetful.run_to_the_end()
    assert forgetful.pool.num_cached == 0


def test_what_a_preempted_sequence_finds_again_does_not_count_as_cached() -> None:
    tight = stepper(num_blocks=5)
    for number in range(3):
        tight.add(request(prompt=[97 + number] * 4, max_tokens=12))
    tight.run_to_the_end()
    assert tight.scheduler.num_preemptions > 0
    assert {sequence.num_cached for sequence in tight.finished} == {0}


def test_a_sequence_without_room_for_its_adapters_is_passed_by_only_so_often() -> None:
    refusing = stepper(max_num_seqs=2, max_bypasses=2)
    (blocked,) = refusing.add(request(adapter="x"))
    admitted = []
    for _ in range(4):
        refusing.residency.refusals = 1
        (younger,) = refusing.add(request(max_tokens=1))
        refusing.step()
        admitted.append(younger.status is SequenceStatus.FINISHED)
    assert admitted == [True, True, False, False]
    refusing.run_to_the_end()
    assert blocked.status is SequenceStatus.FINISHED


def test_a_prompt_that_fills_the_pool_can_wait_and_run() -> None:
    full = stepper(num_blocks=2)
    full.add(request(length=7, max_tokens=1))
    assert full.run_to_the_end() == 1
    (whole,) = full.add(request(length=8, max_tokens=1))
    full.run_to_the_end()
    assert whole.status is SequenceStatus.FINISHED


def test_blocks_of_a_step_that_was_never_computed_are_not_remembered() -> None:
    failing = stepper()
    (sequence,) = failing.add(request(length=8))
    failing.scheduler.schedule()
    failing.scheduler.finish(sequence)
    assert failing.pool.num_cached == 0
    assert failing.pool.num_free == 16


def test_a_finished_sequence_does_not_come_back() -> None:
    sequence = Sequence(request(), 0)
    sequence.move_to(SequenceStatus.FINISHED)
    with pytest.raises(AssertionError):
        sequence.move_to(SequenceStatus.RUNNING)


def test_a_model_without_adapters_has_room_for_none() -> None:
    residency = NoAdapters()
    assert residency.acquire(Sequence(request(), 0))
    with pytest.raises(AssertionError):
        residency.acquire(Sequence(request(adapter="x"), 0))
