"""The draft model by itself: it writes what it would write, wherever it is taken up, and keeps its books."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance
from ovms_lora.engine.draft_model import DraftModel
from ovms_lora.engine.sequence import Sequence
from tests.engine.harness import generate, request
from tests.engine.speculating import draft_model
from tests.fakes import FakeRunner


def sequence(prompt: str = "a prompt", **assistance: float) -> Sequence:
    asking = replace(request("r", prompt), assistance=Assistance(**assistance))  # type: ignore[arg-type]
    return Sequence(asking, 0)


def continuation(tokens: list[int], count: int) -> tuple[int, ...]:
    return tuple(generate(request(prompt=tokens, max_tokens=count))["r"].token_ids)


def check_books(drafter: DraftModel) -> None:
    pool = drafter._tables.pool
    held = [block for shadow in drafter._shadows.values() for block in shadow.tokens.blocks]
    assert all(pool.references(block) == held.count(block) for block in range(pool.num_blocks))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_it_goes_on_from_whatever_was_chosen(prefix_caching: bool) -> None:
    drafter, one = draft_model(prefix_caching=prefix_caching), sequence()
    for right in (0, 2, 5, 1, 5, 5, 0):
        draft = drafter.draft({one: 5})[one].token_ids
        assert draft == continuation(one.token_ids, 5)
        one.token_ids += [*draft[:right], 7]
        check_books(drafter)


def test_what_proved_right_is_not_computed_again() -> None:
    runner = FakeRunner(num_blocks=64)
    drafter, one = draft_model(runner), sequence()
    one.token_ids += drafter.draft({one: 5})[one].token_ids[:3]
    one.token_ids.append(7)
    runner.steps.clear()
    drafter.draft({one: 2})
    begins = [(start, count) for step in runner.steps for _, _, start, count in step]
    assert begins == [(one.num_tokens - 1, 1), (one.num_tokens, 1)]


def test_many_sequences_are_written_in_the_same_steps() -> None:
    runner = FakeRunner(num_blocks=64)
    drafter, several = draft_model(runner), [sequence(f"prompt {number}") for number in range(4)]
    drafts = drafter.draft({each: 2 + number for number, each in enumerate(several)})
    assert [len(drafts[each].token_ids) for each in several] == [2, 3, 4, 5]
    assert [len(step) for step in runner.steps] == [4, 4, 3, 2, 1]


def test_a_long_prompt_is_read_in_several_calls() -> None:
    drafter, one, short = draft_model(max_tokens=8), sequence("a prompt of many words"), sequence("abc")
    assert drafter.draft({one: 3, short: 3}) == {}
    assert drafter.draft({one: 3, short: 3}) == {}
    assert list(drafter.draft({one: 3, short: 3})) == [one]
    assert drafter.draft({one: 3, short: 3})[short].token_ids == continuation(short.token_ids, 3)


def test_a_draft_stands_until_something_is_chosen() -> None:
    runner = FakeRunner(num_blocks=64)
    drafter, one = draft_model(runner), sequence()
    first = drafter.draft({one: 4})
    steps = len(runner.steps)
    assert drafter.draft({one: 4}) == first
    assert len(runner.steps) == steps


def test_what_is_forgotten_gives_its_blocks_back() -> None:
    drafter, one, other = draft_model(), sequence(), sequence("another")
    drafter.draft({one: 4, other: 4})
    drafter.keep([other])
    check_books(drafter)
    drafter.keep([])
    assert drafter._tables.pool.num_free == drafter._tables.pool.num_blocks


def test_without_room_there_is_no_draft() -> None:
    drafter, one, long = draft_model(FakeRunner(num_blocks=3)), sequence("12345678"), sequence("x" * 40)
    drafts = drafter.draft({long: 3, one: 9})
    assert drafts.keys() == {one}
    assert drafts[one].token_ids == continuation(one.token_ids, 5)  # the last of them has no place of its own
    one.token_ids += [7] * 12
    assert drafter.draft({one: 9}) == {}
    check_books(drafter)


def test_nothing_is_written_past_its_length() -> None:
    drafter, one = draft_model(max_model_len=12), sequence("0123456789")
    assert len(drafter.draft({one: 9})[one].token_ids) == 2
    one.token_ids += [7, 7, 7]
    assert drafter.draft({one: 9}) == {}


def test_a_request_may_bound_a_draft_by_confidence() -> None:
    drafter, sure, unsure = draft_model(), sequence(confidence=0.01), sequence("other", confidence=0.999)
    drafts = drafter.draft({sure: 6, unsure: 6})
    assert drafts[sure].token_ids == continuation(sure.token_ids, 6)
    assert unsure not in drafts


def test_tokens_that_the_model_does_not_have_are_not_guessed() -> None:
    drafter = DraftModel(
        FakeRunner(num_blocks=64), vocab_size=101, max_model_len=64, max_tokens=64, prefix_caching=True
    )
    one = Sequence(GenerationRequest("r", (1, 2, 3), SamplingParams()), 0)
    assert max(drafter.draft({one: 30})[one].token_ids) < 101
