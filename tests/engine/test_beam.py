"""Beam search through the engine on a fake device: the same results in any company, and every way to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.errors import DeadlineExceededError, EngineError
from ovms_lora.core.request import FinishReason, GenerationRequest
from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.scheduler import Chunk
from tests.engine.harness import Answer, Answers, alone, build, eventually, generate, request, running
from tests.fakes import EOS, FakeRunner

MATES = ["a", "hello", "hello world", "x" * 21]


def search(
    name: str = "s", prompt: str | Sequence[int] = "hello", *, width: int = 4, **fields: Any
) -> GenerationRequest:
    """Return a request for all results of a beam search."""
    return request(name, prompt, **{"n": width, "beam_width": width, **fields})


def results(answers: Answers, each: GenerationRequest) -> list[Answer]:
    return [answers.of(each.request_id, index) for index in range(each.sampling.n)]


def found(each: GenerationRequest, runner: FakeRunner | None = None, **options: Any) -> list[Answer]:
    """Return the results of a search that has an engine to itself."""
    return results(generate(each, runner=runner, **options), each)


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("num_blocks", [256, 17, 9])
@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 3}, {"enable_prefix_caching": False}]
)
def test_searches_and_greedy_requests_side_by_side_are_as_alone(
    copies: bool, num_blocks: int, options: dict[str, Any]
) -> None:
    searches = [search(f"s{at}", prompt, width=2 + at, max_tokens=9) for at, prompt in enumerate(MATES[:3])]
    greedy = [request(f"g{at}", prompt, seed=at) for at, prompt in enumerate(MATES)]
    runner = FakeRunner(num_blocks=num_blocks, copies_blocks=copies)
    answers = generate(greedy[0], searches[0], greedy[1], *searches[1:], *greedy[2:], runner=runner, **options)
    for each in greedy:
        assert answers[each.request_id].text == alone(each)
    for each in searches:
        assert texts(results(answers, each)) == texts(found(each))


def test_full_blocks_are_shared_and_only_open_ones_copied() -> None:
    runner = FakeRunner(num_blocks=64)
    most = 0

    def look(chunks: Sequence[Chunk]) -> None:
        nonlocal most
        most = max(most, len({block for chunk in chunks for block in chunk.sequence.blocks}))

    runner._before_step = look
    found(search(prompt="x" * 40, width=4, max_tokens=8), runner)
    assert most <= 10 + 4 * 2, "the ten blocks of the prompt are there once"
    assert 0 < runner.num_copies < 8 * 4


def test_results_come_best_first_with_as_many_tokens_each() -> None:
    answers = found(search(width=4, logprobs=2))
    scores = [sum(entry.logprob for entry in answer.logprobs) for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert {len(answer.token_ids) for answer in answers} == {12}
    assert {answer.finish_reason for answer in answers} == {FinishReason.LENGTH}
    assert all(len(answer.pieces) == 1 for answer in answers)
    assert len(set(texts(answers))) == 4


# The end of a result.


def test_eos_ends_results_and_is_not_in_their_text() -> None:
    runner = FakeRunner(num_blocks=256, ends_after=lambda context: len(context) >= 8)
    answers = found(search(width=3), runner)
    assert {answer.token_ids[-1] for answer in answers} == {EOS}
    assert all(answer.text == bytes(answer.token_ids[:-1]).decode() for answer in answers)
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP}


def test_eos_is_not_chosen_before_min_tokens() -> None:
    runner = FakeRunner(num_blocks=256, ends_after=lambda context: True)
    assert [answer.token_ids.index(EOS) for answer in found(search(width=3, min_tokens=4), runner)] == [4] * 3


def test_an_ignored_eos_ends_nothing() -> None:
    runner = FakeRunner(num_blocks=256, ends_after=lambda context: len(context) >= 6)
    best, *_ = found(search(width=3, ignore_eos=True, max_tokens=5), runner)
    assert best.token_ids[1:] == [EOS] * 4
    assert best.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("length", [1, 2])
def test_a_stop_string_ends_the_results_that_hold_it(include: bool, length: int) -> None:
    free = found(search(width=4))[0].text
    stop = free[4 : 4 + length]
    answers = found(search(width=4, stop=[stop], include_stop_str_in_output=include))
    stopped = [answer for answer in answers if answer.stop_reason == stop]
    assert stopped
    for answer in answers:
        assert (answer.finish_reason is FinishReason.STOP) == (answer in stopped)
        assert answer.text.count(stop) == (include and answer in stopped)
        assert not include or answer not in stopped or answer.text.endswith(stop)


def test_a_stop_token_ends_results_and_is_named() -> None:
    stop = found(search(width=3))[0].token_ids[2]
    answers = found(search(width=3, stop_token_ids=[stop]))
    assert stop in {answer.stop_reason for answer in answers}
    assert all((answer.token_ids[-1] == stop) == (answer.stop_reason == stop) for answer in answers)


def test_results_end_at_the_models_length() -> None:
    answers = found(search(width=3, max_tokens=None), max_model_len=16)
    assert [len(answer.token_ids) for answer in answers] == [11] * 3


def test_max_tokens_of_zero_only_computes_the_prompt() -> None:
    answers = found(search(width=3, n=2, max_tokens=0, prompt_logprobs=1))
    assert [(answer.token_ids, len(answer.prompt_logprobs[0])) for answer in answers] == [([], 5)] * 2


# Log-probabilities, penalties.


def test_every_result_has_the_logprobs_of_the_prompt() -> None:
    (scored,) = generate(request(prompt_logprobs=1))["r"].prompt_logprobs
    assert [answer.prompt_logprobs for answer in found(search(prompt_logprobs=1))] == [[scored]] * 4


def test_a_cached_prompt_is_counted_for_every_result() -> None:
    first, second = search("1", "hello world"), search("2", "hello world")
    with running(FakeRunner(num_blocks=64), first) as (engine, answers):
        answers.wait(first)
        engine.submit(second)
        answers.wait(second)
    assert [answer.cached_tokens for answer in results(answers, second)] == [8] * 4
    assert texts(results(answers, first)) == texts(results(answers, second))


def test_penalties_and_biases_change_the_search_and_not_the_logprobs_it_gives() -> None:
    biased = found(search(width=2, max_tokens=1, logit_bias={7: 100.0}, logprobs=0))[0]
    assert biased.token_ids == [7]
    assert biased.logprobs[0].logprob < -20
    assert texts(found(search(repetition_penalty=5.0))) != texts(found(search()))


def test_sampling_fields_do_not_matter() -> None:
    plain = texts(found(search()))
    assert texts(found(search(temperature=1.7, top_k=1, top_p=0.1, min_p=0.5, seed=3))) == plain


@pytest.mark.parametrize("penalty", [-400.0, 0.0, 1.0, 400.0, 1e308, -1e308])
def test_no_length_penalty_is_too_large(penalty: float) -> None:
    runner = FakeRunner(num_blocks=256, ends_after=lambda context: context[-1] % 5 == 0)
    assert all(answer.token_ids for answer in found(search(length_penalty=penalty), runner))


@pytest.mark.parametrize(("penalty", "longer"), [(-2.0, False), (6.0, True)])
def test_a_higher_length_penalty_prefers_longer_results(penalty: float, longer: bool) -> None:
    def ends(context: list[int]) -> bool:
        return context[-1] % 3 == 0

    runner = FakeRunner(num_blocks=256, ends_after=ends)
    lengths = [len(found(search(length_penalty=each, n=1, early_stopping="never"), runner)[0].token_ids)
               for each in (0.0, penalty)]  # fmt: skip
    assert (lengths[1] >= lengths[0]) if longer else (lengths[1] <= lengths[0])


# Other ends.


@pytest.mark.parametrize("step", [0, 1, 4])
@pytest.mark.parametrize("num_blocks", [64, 12])
def test_a_cancelled_search_is_gone_within_two_steps(step: int, num_blocks: int) -> None:
    runner, other = FakeRunner(num_blocks=num_blocks), request("o", "other", max_tokens=20)
    victim, answers = search("c", max_tokens=20), Answers()
    engine = build(answers, runner)

    def before_step(_: Sequence[Chunk]) -> None:
        if len(runner.steps) == step + 1:
            engine.cancel("c")

    runner._before_step = before_step
    engine.submit(victim)
    engine.submit(other)
    engine.start()
    answers.wait(other)
    eventually(lambda: engine.stats().kv_cache_usage == 0 and engine.stats().running == 0)
    engine.submit(victim)  # its id is free again
    answers.wait(victim)
    engine.stop()
    late = [row for rows in runner.steps[step + 2 : step + 8] for row in rows if row[0] == "c"]
    assert not late
    assert answers["o"].text == alone(other)


def test_a_search_that_is_overdue_ends_with_an_error_for_each_result() -> None:
    now = [0.0]

    def advance(_: Sequence[Chunk]) -> None:
        now[0] += 1.0

    runner = FakeRunner(num_blocks=64, before_step=advance)
    late, other = search("late", deadline=4.0, max_tokens=20), request("other")
    answers = generate(late, other, runner=runner, clock=lambda: now[0])
    assert all(isinstance(answer.error, DeadlineExceededError) for answer in results(answers, late))
    assert answers["other"].text == alone(other)


def test_a_failing_step_fails_the_search_as_one() -> None:
    runner = FakeRunner(num_blocks=64)

    def before_step(_: Sequence[Chunk]) -> None:
        if len(runner.steps) >= 4:  # again and again: what fails once is tried in halves
            runner.fail_next = EngineError("the device failed")

    runner._before_step = before_step
    failed = search(n=2)
    answers = generate(failed, runner=runner)
    assert [str(answer.error) for answer in results(answers, failed)] == ["the device failed"] * 2


class BadBeamRunner(FakeRunner):
    """Gives NaN for one beam of the requests named `bad`, some tokens after the prompt."""

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        row = super()._logits(context, chunk)
        sequence = chunk.sequence
        if sequence.request.request_id == "bad" and sequence.num_output == 3 and context[-1] % 2:
            row[9] = np.nan
        return row


def test_logits_that_are_not_finite_fail_the_search_and_nothing_else() -> None:
    bad, good = search("bad", width=6), search("good", width=3)
    answers = generate(bad, good, runner=BadBeamRunner(num_blocks=128))
    assert all(isinstance(answer.error, EngineError) for answer in results(answers, bad))
    assert texts(results(answers, good)) == texts(found(good))


def test_a_search_that_may_choose_too_few_tokens_fails() -> None:
    narrow = search(width=3, min_tokens=1, max_tokens=1, stop_token_ids=range(255))
    assert all(isinstance(answer.error, EngineError) for answer in found(narrow))


def test_stopping_tells_every_result_of_a_search() -> None:
    runner, each = FakeRunner(num_blocks=64), search(max_tokens=50)
    runner.gate.clear()
    with running(runner, each) as (engine, answers):
        eventually(lambda: engine.stats().running == 1)
        runner.gate.set()
        engine.stop()
        answers.wait(each)
    assert all(answer.finished for answer in results(answers, each))
