"""The engine on a fake device: the same text in any company, and nobody left waiting whatever happens."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ovms_lora.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidFieldError,
    NoMemoryError,
    OvmsLoraError,
    QueueFullError,
    UnavailableError,
)
from ovms_lora.core.request import FinishReason, GenerationRequest
from ovms_lora.engine.live_requests import LiveRequests
from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence as EngineSequence
from tests.engine.harness import Answer, Answers, AnyAdapters, alone, build, eventually, generate, request, running
from tests.fakes import EOS, FakeRunner

PROMPTS = ["a", "hello", "hello world", "hello world, how are you", "x" * 31, "another one"]


# The same text in any company.


def test_greedy_text_does_not_depend_on_batch_mates() -> None:
    requests = [request(str(number), prompt) for number, prompt in enumerate(PROMPTS)]
    together = generate(*requests)
    for each in requests:
        assert together[each.request_id].text == alone(each)


def test_a_text_is_the_sum_of_its_pieces_with_one_token_each() -> None:
    answer = generate(request(max_tokens=20))["r"]
    assert len(answer.pieces) == len(answer.token_ids) == 20
    assert answer.text == bytes(answer.token_ids).decode()
    assert answer.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("budget", range(1, 13))
def test_the_borders_of_prefill_chunks_change_nothing(budget: int) -> None:
    requests = [request("one", "hello world"), request("two", "hello w")]
    answers = generate(*requests, max_num_batched_tokens=budget)
    for each in requests:
        assert answers[each.request_id].text == alone(each)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_preemption_changes_nothing(caching: bool, split: bool) -> None:
    requests = [request(str(number), prompt, max_tokens=20) for number, prompt in enumerate(PROMPTS)]
    with running(FakeRunner(num_blocks=14), *requests, enable_prefix_caching=caching, dynamic_split_fuse=split) as (
        engine,
        answers,
    ):
        answers.wait(*requests)
        assert engine.stats().preemptions > 0
    for each in requests:
        assert answers[each.request_id].text == alone(each)


def test_a_cached_prefix_changes_nothing_and_is_counted() -> None:
    first, second, third = request("1", "hello world"), request("2", "hello world"), request("3", "hello work")
    with running(FakeRunner(), first) as (engine, answers):
        answers.wait(first)
        engine.submit(second)
        engine.submit(third)
        answers.wait(second, third)
        stats = engine.stats()
    assert [answers[name].cached_tokens for name in "123"] == [0, 8, 8]
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (32, 16)
    assert answers["1"].text == answers["2"].text == alone(first)
    assert answers["3"].text == alone(third)


@pytest.mark.parametrize("other", [{"adapter": "x"}, {"salt": "theirs"}])
def test_a_cached_prefix_is_not_shared_across_adapters_and_owners(other: dict[str, Any]) -> None:
    first, second = request("1", "hello world"), request("2", "hello world", **other)
    with running(FakeRunner(), first) as (engine, answers):
        answers.wait(first)
        engine.submit(second)
        answers.wait(second)
    assert answers["2"].cached_tokens == 0
    assert answers["2"].text == alone(second)


def test_requests_with_different_adapters_share_a_batch() -> None:
    requests = [request(name or "base", adapter=name) for name in ("", "x", "y")]
    runner = FakeRunner(num_blocks=256)
    answers = generate(*requests, runner=runner)
    assert {row[0] for row in runner.steps[0]} == {"base", "x", "y"}
    assert len({answers[each.request_id].text for each in requests}) == 3
    for each in requests:
        assert answers[each.request_id].text == alone(each)


# Seeds.


def test_sequences_of_one_seeded_request_differ_and_come_again_in_any_batch() -> None:
    seeded = request(n=3, seed=7, temperature=1.0)
    apart = generate(seeded)
    mates = [request(str(number), prompt, temperature=1.0) for number, prompt in enumerate(PROMPTS)]
    mixed = generate(*mates[:3], seeded, *mates[3:], runner=FakeRunner(num_blocks=20), max_num_batched_tokens=7)
    texts = [apart.of("r", index).text for index in range(3)]
    assert len(set(texts)) == 3
    assert texts == [mixed.of("r", index).text for index in range(3)]


def test_another_seed_gives_another_text() -> None:
    texts = {generate(request(seed=seed, temperature=1.0))["r"].text for seed in range(4)}
    assert len(texts) == 4


def test_without_a_seed_the_sequences_of_a_request_differ() -> None:
    answers = generate(request(n=4, temperature=1.0))
    assert len({answers.of("r", index).text for index in range(4)}) == 4


# The end of a sequence.


def ends_at(length: int) -> FakeRunner:
    return FakeRunner(num_blocks=256, ends_after=lambda context: len(context) >= length)


def test_eos_ends_a_sequence_and_is_not_in_its_text() -> None:
    answer = generate(request(skip_special_tokens=False), runner=ends_at(8))["r"]
    assert answer.token_ids[-1] == EOS
    assert answer.text == bytes(answer.token_ids[:-1]).decode()
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, None)


def test_eos_is_no_stop_string_and_is_not_included_as_one() -> None:
    keeps = request(skip_special_tokens=False, include_stop_str_in_output=True)
    assert generate(keeps, runner=ends_at(8))["r"].text == generate(request(), runner=ends_at(8))["r"].text


def test_an_ignored_eos_is_in_the_text_when_special_tokens_are_kept() -> None:
    keeps = request(skip_special_tokens=False, ignore_eos=True, max_tokens=4)
    assert generate(keeps, runner=ends_at(8))["r"].text.endswith("</s>")


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    answer = generate(request(ignore_eos=True, max_tokens=4), runner=ends_at(6))["r"]
    assert answer.token_ids[1:] == [EOS] * 3
    assert answer.finish_reason is FinishReason.LENGTH


def test_eos_is_not_chosen_before_min_tokens() -> None:
    answer = generate(request(min_tokens=3), runner=ends_at(0))["r"]
    assert EOS not in answer.token_ids[:3]
    assert answer.token_ids[3:] == [EOS]
    assert len(answer.text) == 3


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_a_sequence_and_is_named(include: bool) -> None:
    free = generate(request())["r"]
    stop = free.token_ids[4]
    place = free.token_ids.index(stop)
    answer = generate(request(stop_token_ids=[stop], include_stop_str_in_output=include))["r"]
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)
    assert answer.token_ids == free.token_ids[: place + 1]
    assert answer.text == free.text[: place + include]


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_and_is_named(length: int, include: bool) -> None:
    free = generate(request())["r"].text
    stop = free[3 : 3 + length]
    at = free.index(stop)
    answer = generate(request(stop=["never", stop], include_stop_str_in_output=include))["r"]
    assert answer.text == free[: at + length * include]
    assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)


def test_the_start_of_a_stop_string_comes_out_when_the_text_ends_otherwise() -> None:
    free = generate(request(max_tokens=6))["r"].text
    answer = generate(request(max_tokens=6, stop=[free[-2:] + "!"]))["r"]
    assert answer.text == free
    assert answer.finish_reason is FinishReason.LENGTH


def test_without_max_tokens_a_sequence_ends_at_the_models_length() -> None:
    answer = generate(request(prompt="hello", max_tokens=None), max_model_len=20)["r"]
    assert len(answer.token_ids) == 15
    assert answer.finish_reason is FinishReason.LENGTH


def test_max_tokens_of_zero_only_computes_the_prompt() -> None:
    answer = generate(request(max_tokens=0, prompt_logprobs=1))["r"]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], FinishReason.LENGTH)
    assert len(answer.prompt_logprobs[0]) == 5


def test_a_prompt_that_fills_the_whole_cache_is_computed_when_nothing_follows() -> None:
    full, after = request("full", [97] * 16, max_tokens=0), request("after", max_tokens=2)
    answers = generate(full, after, runner=FakeRunner(num_blocks=4))
    assert answers["full"].finish_reason is FinishReason.LENGTH
    assert len(answers["after"].token_ids) == 2


# Log-probabilities.


def expected_logprob(runner: FakeRunner, context: Sequence[int], token: int) -> float:
    asks = request("probe", context, max_tokens=1, logit_bias={token: 100.0}, logprobs=0)
    return generate(asks, runner=runner)["probe"].logprobs[0].logprob


def test_logprobs_are_those_of_the_model_and_best_first() -> None:
    answer = generate(request(logprobs=20))["r"]
    assert len(answer.logprobs) == len(answer.token_ids)
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        values = [logprob for _, logprob in entry.top]
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == values[0]
        assert values == sorted(values, reverse=True)
        assert 0 < sum(np.exp(values)) <= 1 + 1e-6


def test_logprobs_do_not_change_with_sampling_and_penalties() -> None:
    plain = generate(request(max_tokens=1, logprobs=3))["r"]
    biased = generate(request(max_tokens=1, logprobs=3, temperature=0.3, seed=1, logit_bias={5: 90.0}))["r"]
    assert biased.token_ids == [5]
    assert biased.logprobs[0].top == plain.logprobs[0].top


def test_without_logprobs_none_come() -> None:
    answer = generate(request())["r"]
    assert (answer.logprobs, answer.prompt_logprobs) == ([], [])


def test_prompt_logprobs_come_once_and_are_those_of_each_next_token() -> None:
    answer = generate(request(prompt="hello", prompt_logprobs=2))["r"]
    ((first, *rest),) = answer.prompt_logprobs
    assert first is None
    prompt = b"hello"
    for place, entry in enumerate(rest, start=1):
        assert entry is not None
        assert (entry.token_id, len(entry.top)) == (prompt[place], 2)
        wanted = expected_logprob(FakeRunner(num_blocks=256), prompt[:place], prompt[place])
        assert entry.logprob == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 11, 64])
def test_prompt_logprobs_do_not_depend_on_chunks_or_preemption(budget: int) -> None:
    whole = generate(request(prompt="hello world!", prompt_logprobs=1))["r"].prompt_logprobs
    requests = [request(str(number), "hello world!", prompt_logprobs=1, max_tokens=12) for number in range(4)]
    tight = generate(*requests, runner=FakeRunner(num_blocks=9), max_num_batched_tokens=budget)
    for each in requests:
        assert tight[each.request_id].prompt_logprobs == whole


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    first, second = request("1", "hello world!"), request("2", "other prompt", prompt_logprobs=0)
    runner = FakeRunner(num_blocks=8)
    with running(runner, first, second, max_num_batched_tokens=2) as (engine, answers):
        answers.wait(first, second)
        assert engine.stats().preemptions > 0
    starts = [row[2] for rows in runner.steps for row in rows if row[0] == "2"]
    assert 0 in starts[1:12], "it was not preempted in the middle of its prompt"
    assert answers["2"].prompt_logprobs == generate(second)["2"].prompt_logprobs


def test_prompt_logprobs_change_no_text_of_the_batch() -> None:
    asking = [request(str(number), prompt, prompt_logprobs=number % 2) for number, prompt in enumerate(PROMPTS)]
    answers = generate(*asking[:3], request("plain"), *asking[3:])
    assert answers["plain"].text == alone(request())
    for each, prompt in zip(asking, PROMPTS, strict=True):
        assert answers[each.request_id].text == alone(request(prompt=prompt))


# Cancelling.


def cancels_in_step(step: int, runner: FakeRunner, **options: Any) -> tuple[FakeRunner, Answers]:
    """Cancel request `c` while the given step runs; return when everything else has ended."""
    victim, other = request("c", "hello world", max_tokens=30), request("o", "other", max_tokens=10)
    answers = Answers()
    engine = build(answers, runner, **options)

    def before_step(_: Sequence[Chunk]) -> None:
        if len(runner.steps) == step:
            engine.cancel("c")

    runner._before_step = before_step
    for each in (other, victim):
        engine.submit(each)
    engine.start()
    answers.wait(other)
    eventually(lambda: engine.stats().kv_cache_usage == 0)
    assert engine.stats().waiting == engine.stats().running == 0
    engine.stop()
    return runner, answers


@pytest.mark.parametrize(
    ("state", "step", "options"),
    [
        ("waiting", 2, {"max_num_seqs": 1}),
        ("prefill", 2, {"max_num_batched_tokens": 4}),
        ("decode", 5, {}),
    ],
)
def test_a_cancelled_request_is_gone_within_two_steps(state: str, step: int, options: dict[str, Any]) -> None:
    runner, answers = cancels_in_step(step, FakeRunner(num_blocks=64), **options)
    assert not [row for rows in runner.steps[step + 1 :] for row in rows if row[0] == "c"]
    assert ("c" in answers) == (state == "decode")
    assert answers["o"].text == alone(request(prompt="other", max_tokens=10))


def test_cancelling_twice_or_something_unknown_does_nothing() -> None:
    each = request()
    with running(FakeRunner()) as (engine, answers):
        engine.cancel("nobody")
        engine.submit(each)
        answers.wait(each)
        engine.cancel("r")
        engine.cancel("r")
        after = request("after")
        engine.submit(after)
        answers.wait(after)
    assert answers["after"].text == answers["r"].text


def test_a_request_cancelled_before_it_is_seen_never_runs() -> None:
    runner, other = FakeRunner(), request("other")
    answers = Answers()
    engine = build(answers, runner)
    engine.submit(request("gone", n=2))
    engine.cancel("gone")
    engine.submit(other)
    engine.start()
    answers.wait(other)
    engine.stop()
    assert "gone" not in answers
    assert {row[0] for rows in runner.steps for row in rows} == {"other"}


# Failures.


def fails_with(*request_ids: str, index: int | None = None) -> FakeRunner:
    """Return a runner whose steps fail when one of these requests, or one sequence of them, takes part."""

    def before_step(chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if chunk.sequence.request.request_id in request_ids and index in (None, chunk.sequence.index):
                raise EngineError("the device failed")

    return FakeRunner(num_blocks=256, before_step=before_step)


def test_a_failing_step_fails_only_its_batch() -> None:
    first, second = request("first", n=2), request("second")
    answers = generate(first, second, runner=fails_with("first"), max_num_seqs=2)
    for index in range(2):
        assert str(answers.of("first", index).error) == "the device failed"
    assert answers["second"].text == alone(second)


def test_a_failing_step_ends_all_sequences_of_its_requests() -> None:
    answers = generate(request(n=3), runner=fails_with("r", index=1), max_num_seqs=2)
    assert [isinstance(answers.of("r", index).error, EngineError) for index in range(3)] == [True] * 3


@pytest.mark.parametrize("guilty", [0, 3, 6])
def test_who_makes_a_step_fail_fails_alone(guilty: int) -> None:
    requests = [request(str(i), f"prompt {i}", adapter=f"a{i % 2}", prompt_logprobs=0) for i in range(7)]
    answers = generate(*requests, runner=fails_with(str(guilty)))
    assert str(answers[str(guilty)].error) == "the device failed"
    for each in (*requests[:guilty], *requests[guilty + 1 :]):
        assert answers[each.request_id].text == alone(each)


def test_a_step_that_fails_once_fails_nobody() -> None:
    runner = FakeRunner(num_blocks=256)
    runner.fail_next = EngineError("the device failed")
    both = request("1"), request("2", "other")
    answers = generate(*both, runner=runner)
    assert [answers[each.request_id].text for each in both] == [alone(each) for each in both]


def test_a_host_without_memory_fails_the_step_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    really, calls = Sampler.sample, 0

    def scarce(self: Sampler, logits: FloatArray, sequences: Sequence[EngineSequence]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return really(self, logits, sequences)

    monkeypatch.setattr(Sampler, "sample", scarce)
    first, second, after = request("first", n=2), request("second"), request("after")
    with running(FakeRunner(num_blocks=256), first, second) as (engine, answers):
        answers.wait(first, second)
        assert {type(answers.of(*key).error) for key in (("first", 0), ("first", 1), ("second", 0))} == {NoMemoryError}
        assert engine.stats().kv_cache_usage == 0
        engine.submit(after)
        answers.wait(after)
    assert answers["after"].text == alone(after)


def test_adapters_that_find_no_memory_fail_only_their_request() -> None:
    class NoRoom(AnyAdapters):
        def acquire(self, sequence: EngineSequence) -> bool:
            if any(use.digest == "big" for use in sequence.request.adapters):
                raise NoMemoryError("no memory for the adapters of the request")
            return True

    big, small, base = request("big", adapter="big", n=2), request("small", adapter="small"), request("base")
    answers = generate(base, big, small, residency=NoRoom())
    assert {type(answers.of("big", index).error) for index in range(2)} == {NoMemoryError}
    assert [answers[each.request_id].text for each in (small, base)] == [alone(small), alone(base)]


def test_blocks_of_a_failed_step_are_never_taken_for_computed() -> None:
    runner = FakeRunner()
    runner.fail_next = EngineError("the device failed")
    first, second = request("1", "hello world"), request("2", "hello world")
    with running(runner, first) as (engine, answers):
        answers.wait(first)
        engine.submit(second)
        answers.wait(second)
    assert answers["2"].cached_tokens == 0
    assert answers["2"].text == alone(second)


def test_a_bug_in_the_runner_ends_everything_with_an_error() -> None:
    def breaks(_: Sequence[Chunk]) -> None:
        raise ZeroDivisionError

    first, second = request("first", n=2), request("second")
    with running(FakeRunner(before_step=breaks), first, second, max_num_seqs=1) as (engine, answers):
        answers.wait(first, second)
        for answer in (answers.of("first", 0), answers.of("first", 1), answers["second"]):
            assert isinstance(answer.error, EngineError)
            assert "ZeroDivisionError" in answer.error.message
        with pytest.raises(EngineError, match="the engine has failed"):
            engine.submit(request("late"))


class BadRowRunner(FakeRunner):
    """Gives one bad value in the rows of request `bad`."""

    bad = float("nan")

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        row = super()._logits(context, chunk)
        if chunk.sequence.request.request_id == "bad":
            row[7] = self.bad
        return row


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_logits_that_are_not_finite_fail_only_their_own_request(value: float, sampling: dict[str, Any]) -> None:
    runner = BadRowRunner(num_blocks=256)
    runner.bad = value
    good = request("good", "good prompt")
    answers = generate(request("bad", **sampling), good, runner=runner)
    assert isinstance(answers["bad"].error, EngineError)
    assert answers["good"].text == alone(good)


def test_a_request_that_forbids_every_token_fails_alone() -> None:
    forbids = request("forbids", min_tokens=1, stop_token_ids=range(257), temperature=1.0, top_k=5)
    good = request("good")
    answers = generate(forbids, good)
    assert isinstance(answers["forbids"].error, EngineError)
    assert answers["good"].text == alone(good)


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_that_is_overdue_ends_with_an_error(waits: bool) -> None:
    now = [0.0]

    def advance(_: Sequence[Chunk]) -> None:
        now[0] += 1.0

    late, other = request("late", deadline=4.0, max_tokens=30), request("other")
    requests = [other, late] if waits else [late, other]
    answers = generate(
        *requests, runner=FakeRunner(before_step=advance), clock=lambda: now[0], max_num_seqs=1 if waits else 2
    )
    assert isinstance(answers["late"].error, DeadlineExceededError)
    assert len(answers["late"].token_ids) == (0 if waits else 5)
    assert answers["other"].text == alone(other)


# What is refused at the door.


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 1, "prompt is empty"),
        (21, 1, "Number of prompt tokens: 21 exceeds model max length: 20"),
        (20, None, "Number of prompt tokens: 20 exceeds model max length: 20"),
        (21, 0, "Number of prompt tokens: 21 exceeds model max length: 20"),
        (15, 6, "Number of prompt tokens: 15 + max tokens value: 6 exceeds model max length: 20"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(prompt: int, max_tokens: int | None, message: str) -> None:
    engine = build(Answers(), FakeRunner(), max_model_len=20)
    with pytest.raises(InvalidFieldError) as refused:
        engine.submit(request(prompt=[97] * prompt, max_tokens=max_tokens))
    assert refused.value.message == message


@pytest.mark.parametrize(("prompt", "max_tokens"), [(20, 0), (15, 5), (19, None), (1, 19)])
def test_a_prompt_that_just_fits_runs_to_its_end(prompt: int, max_tokens: int | None) -> None:
    answer = generate(request(prompt=[97] * prompt, max_tokens=max_tokens), max_model_len=20)["r"]
    assert len(answer.token_ids) == (20 - prompt if max_tokens is None else max_tokens)


def test_the_models_length_is_never_more_than_the_cache_holds() -> None:
    assert build(Answers(), FakeRunner(num_blocks=5, block_size=4), max_model_len=256).max_model_len == 20


@pytest.mark.parametrize(
    "bad", [{"prompt": [97, 257]}, {"prompt": [-1]}, {"logit_bias": {257: 1.0}}, {"stop_token_ids": [-1]}]
)
def test_a_token_id_outside_of_the_vocabulary_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidFieldError, match="token id"):
        build(Answers(), FakeRunner()).submit(request(**bad))


def test_more_sequences_than_may_ever_wait_are_refused() -> None:
    engine = build(Answers(), FakeRunner())
    engine.check(request(n=4096))
    with pytest.raises(InvalidFieldError, match="n must be at most 4096"):
        engine.check(request(n=4097))


def test_who_was_taken_in_when_the_engine_broke_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = LiveRequests.begin

    def begin_or_break(live: LiveRequests, begun: GenerationRequest) -> None:
        if begun.request_id == "2":
            raise MemoryError
        begin(live, begun)

    monkeypatch.setattr(LiveRequests, "begin", begin_or_break)
    runner, requests = FakeRunner(), [request(name) for name in "1234"]
    runner.gate.clear()
    with running(runner, request("0"), max_waiting=4) as (engine, answers):
        eventually(lambda: engine.stats().running == 1)
        engine.submit(*requests)
        runner.gate.set()
        answers.wait(*requests)
    assert {type(answers[each.request_id].error) for each in requests} == {EngineError}


def test_a_full_queue_refuses_the_next_request_and_recovers() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    requests = [request(str(number)) for number in range(4)]
    with running(runner, *requests[:2], max_waiting=2) as (engine, answers):
        eventually(lambda: engine.stats().running == 2)
        for each in requests[2:]:
            engine.submit(each)
        assert engine.stats().waiting == 2
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            engine.submit(request("too many"))
        runner.gate.set()
        answers.wait(*requests)
        engine.submit(request("again"))
        answers.wait(request("again"))


@pytest.mark.parametrize("n", [1, 3])
def test_the_queue_counts_requests_and_not_their_sequences(n: int) -> None:
    runner = FakeRunner()
    runner.gate.clear()
    requests = [request(str(number), n=n) for number in range(4)]
    with running(runner, *requests[:1], max_waiting=3, max_num_seqs=n) as (engine, answers):
        eventually(lambda: engine.stats().running == n)
        for each in requests[1:]:
            engine.submit(each)
        engine.cancel("nobody")
        assert engine.stats().waiting == 3
        with pytest.raises(QueueFullError):
            engine.submit(request("too many"))
        runner.gate.set()
        answers.wait(*requests)


def test_an_id_that_is_in_use_is_refused_and_free_when_its_request_has_ended() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    first, second = request("twin"), request("twin", "other")
    with running(runner, first) as (engine, answers):
        for _ in range(2):  # in the inbox, then in the engine
            with pytest.raises(InvalidFieldError, match="twin runs already"):
                engine.submit(second)
            eventually(lambda: engine.stats().running == 1)
        runner.gate.set()
        answers.wait(first)
        assert answers["twin"].text == alone(first)
        eventually(lambda: engine.stats().running == 0)
        engine.cancel("twin")
        answers.forget("twin")
        engine.submit(second)
        answers.wait(second)
    assert answers["twin"].text == alone(second)


# Stopping.


def test_draining_refuses_new_requests_and_lets_running_ones_end() -> None:
    runner, each = FakeRunner(), request()
    runner.gate.clear()
    with running(runner, each) as (engine, answers):
        eventually(lambda: bool(runner.steps) or engine.stats().running == 1)
        stopping = threading.Thread(target=engine.stop, kwargs={"drain_seconds": 20})
        stopping.start()
        eventually(lambda: refusal(engine.submit) is not None)
        assert isinstance(refusal(engine.submit), UnavailableError)
        runner.gate.set()
        stopping.join()
        assert answers["r"].text == alone(each)


def refusal(submit: Any) -> OvmsLoraError | None:
    try:
        submit(request("late", max_tokens=1))
    except OvmsLoraError as error:
        return error
    return None


def test_stopping_without_draining_tells_all_who_run_wait_or_have_just_come() -> None:
    runner = FakeRunner()
    runner.gate.clear()
    first, second, third = request("runs"), request("waits"), request("came", n=2)
    with running(runner, first, second, max_num_seqs=1) as (engine, answers):
        eventually(lambda: engine.stats().running == 1)
        engine.submit(third)
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        eventually(lambda: engine._abort)
        runner.gate.set()
        stopping.join()
        answers.wait(first, second, third)
    for answer in (answers["runs"], answers["waits"], answers.of("came", 1)):
        assert isinstance(answer.error, UnavailableError)


def test_stopping_twice_or_before_the_start_is_harmless() -> None:
    build(Answers(), FakeRunner()).stop()
    engine = build(Answers(), FakeRunner())
    engine.start()
    engine.stop()
    engine.stop(drain_seconds=1)
    with pytest.raises(UnavailableError):
        engine.submit(request())


def test_an_idle_engine_shows_that_it_is_alive() -> None:
    with running(FakeRunner()) as (engine, _):
        beat = engine._beat
        eventually(lambda: engine._beat > beat)
        assert engine.heartbeat_age() < 20


# Many at once.


def test_stats_count_what_was_done() -> None:
    with running(FakeRunner(), request("a", "hello", max_tokens=3), request("b", "hi", n=2, max_tokens=4)) as (
        engine,
        answers,
    ):
        answers.wait(request("a"), request("b", n=2))
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (7, 11)
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0)


def test_many_threads_submit_and_cancel_at_once() -> None:
    kept: dict[str, str] = {}
    expected = {prompt: alone(request(prompt=prompt)) for prompt in PROMPTS}
    with running(FakeRunner(num_blocks=40), max_num_batched_tokens=16, max_waiting=1000) as (engine, answers):

        def client(number: int) -> None:
            choices = random.Random(number)
            for turn in range(15):
                name, prompt = f"{number}-{turn}", choices.choice(PROMPTS)
                engine.submit(request(name, prompt))
                if choices.random() < 0.4:
                    engine.cancel(name)
                else:
                    kept[name] = prompt

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answers.wait(*(request(name) for name in kept))
        eventually(lambda: engine.stats().kv_cache_usage == 0 and engine.stats().waiting == 0)
    assert all(_whole(answers[name]) == expected[prompt] for name, prompt in kept.items())


def _whole(answer: Answer) -> str:
    assert answer.error is None
    return answer.text
