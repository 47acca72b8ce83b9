"""Guessing ahead changes no answer, whoever guesses; and it guesses only as far as that is worth its price."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ovms_lora.core.constraint import ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import EngineError
from ovms_lora.core.request import GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.core.speculation import Assistance, SpeculationOptions
from ovms_lora.engine.drafts import Draft, Drafter
from ovms_lora.engine.prompt_lookup import PromptLookup
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.speculation import Speculation
from ovms_lora.engine.step_cost import StepCost
from ovms_lora.engine.structured import ConstraintCompiler
from tests.engine.harness import TOKENIZER, Answers, ScriptedRunner, eventually, generate, request, running
from tests.engine.speculating import Broken, Oracle, draft_model
from tests.fakes import EOS, FakeRunner

OPTIONS = SpeculationOptions(num_tokens=5)
COMPILER = ConstraintCompiler(TOKENIZER, [EOS])
ROUND = b"abcabcabcabcabcabcabcabcabcabc the end"


@pytest.fixture(autouse=True)
def rows_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "price", lambda *_: 0.0)


def ends_sometimes(context: list[int]) -> bool:
    return len(context) > 12 and sum(context) % 11 == 0


def device(**kwargs: Any) -> FakeRunner:
    return FakeRunner(**{"num_blocks": 256, "ends_after": ends_sometimes, **kwargs})


def constrained(each: GenerationRequest, kind: ConstraintKind, source: str) -> GenerationRequest:
    return replace(each, constraint=COMPILER.compile(ConstraintSpec(kind, source), param="field"))


def all_sorts() -> list[GenerationRequest]:
    schema = json.dumps({"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]})
    return [
        request("greedy", max_tokens=40),
        request("adapted", adapter="x", max_tokens=40),
        request("other", adapter="y", max_tokens=30, logprobs=2),
        request("seeded", temperature=1.0, seed=4, max_tokens=40, logprobs=3),
        request("hot", temperature=2.0, seed=5, top_p=0.9, n=3, max_tokens=25),
        request("cold", temperature=0.3, seed=6, top_k=4, min_p=0.05, max_tokens=25),
        request("penalties", repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, max_tokens=40),
        request("biased", logit_bias={101: 2.5}, temperature=1.0, seed=7, max_tokens=40),
        request("late", min_tokens=18, max_tokens=40),
        request("stopped", stop=["a", "e f"], max_tokens=60, temperature=1.0, seed=8),
        request("included", stop=["b"], include_stop_str_in_output=True, max_tokens=60),
        request("by token", stop_token_ids=[104], max_tokens=60),
        request("endless", ignore_eos=True, max_tokens=45),
        request("prompt", prompt_logprobs=1, logprobs=0, max_tokens=9),
        request("one", max_tokens=1),
        request("two", max_tokens=2),
        request("none", max_tokens=0),
        request("beams", n=2, beam_width=3, max_tokens=12),
        constrained(request("json", max_tokens=60), ConstraintKind.JSON_SCHEMA, schema),
        constrained(request("regex", temperature=1.0, seed=9, max_tokens=60), ConstraintKind.REGEX, "(ab|ba){4,9}"),
    ]


def whole(answers: Answers, requests: list[GenerationRequest]) -> dict[tuple[str, int], Any]:
    found = {}
    for each in requests:
        for index in range(each.sampling.n):
            answer = answers.of(each.request_id, index)
            assert answer.error is None
            ending = (answer.finish_reason, answer.stop_reason)
            logprobs = (answer.logprobs, answer.prompt_logprobs)
            found[each.request_id, index] = (answer.token_ids, answer.text, *ending, *logprobs)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Any]:
    requests = all_sorts()
    return whole(generate(*requests, runner=device()), requests)


def knowing(expected: dict[tuple[str, int], Any], spoil: Callable[[int], bool]) -> Oracle:
    """Return a drafter that knows the answers, but for the tokens at the places that are spoilt."""

    def guess(sequence: Sequence, count: int) -> list[int]:
        tokens = expected[sequence.request.request_id, sequence.index][0]
        begin = sequence.num_output
        to_come = [*tokens[begin : begin + count], *[EOS] * count][:count]
        return [7 if spoil(place) else token for place, token in enumerate(to_come, start=begin)]

    return Oracle(guess)


DRAFTERS: dict[str, Callable[[dict[tuple[str, int], Any]], Drafter]] = {
    "always right": lambda expected: knowing(expected, lambda _: False),
    "always wrong": lambda expected: knowing(expected, lambda _: True),
    "wrong at times": lambda expected: knowing(expected, lambda place: place % 4 == 2),
    "lookup": lambda _: PromptLookup(OPTIONS),
    "draft model": lambda _: draft_model(device()),
    "small draft model": lambda _: draft_model(device(num_blocks=12), max_tokens=7, max_model_len=30),
    "another draft model": lambda _: draft_model(ScriptedRunner(ROUND)),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 6}, {"enable_prefix_caching": False}],
    ids=["roomy", "small steps", "uncached"],
)
def test_answers_are_those_without_guessing(
    expected: dict[tuple[str, int], Any], drafter: str, options: dict[str, Any]
) -> None:
    requests = all_sorts()
    guessing = DRAFTERS[drafter](expected)
    answers = generate(*requests, runner=device(), drafter=guessing, speculation=OPTIONS, **options)
    assert whole(answers, requests) == expected


@pytest.mark.parametrize("drafter", ["always right", "wrong at times", "draft model"])
def test_answers_are_the_same_where_blocks_run_out(expected: dict[tuple[str, int], Any], drafter: str) -> None:
    requests = [each for each in all_sorts() if each.request_id != "beams"]
    runner = device(num_blocks=20)
    with running(runner, *requests, drafter=DRAFTERS[drafter](expected), speculation=OPTIONS) as (engine, answers):
        answers.wait(*requests)
        assert engine.stats().preemptions > 0
        assert engine.stats().kv_cache_usage == 0
    assert whole(answers, requests) == {key: value for key, value in expected.items() if key[0] != "beams"}


def test_what_is_known_comes_in_few_steps() -> None:
    each = request(max_tokens=24)
    answer = generate(each)["r"]
    runner = FakeRunner(num_blocks=256)
    right = Oracle(lambda sequence, count: answer.token_ids[sequence.num_output :][:count])
    with running(runner, each, drafter=right, speculation=OPTIONS) as (engine, answers):
        answers.wait(each)
        stats = engine.stats()
    # The prompt brings a token, three steps six each, and the last what is left: a draft of four and one more.
    assert len(runner.steps) == 5
    assert stats.speculation is not None
    assert (stats.speculation.drafts, stats.speculation.draft_tokens, stats.speculation.accepted_tokens) == (4, 19, 19)
    assert stats.generation_tokens == 24


def test_a_draft_model_that_is_the_model_is_always_right() -> None:
    each = [request(f"{i}", f"prompt {i}", max_tokens=30) for i in range(4)]
    with running(FakeRunner(num_blocks=256), *each, drafter=draft_model(), speculation=OPTIONS) as (engine, answers):
        answers.wait(*each)
        stats = engine.stats().speculation
    assert stats is not None
    assert stats.accepted_tokens == stats.draft_tokens > 60


def test_text_that_goes_round_is_looked_up() -> None:
    each = request(max_tokens=60)
    runner = ScriptedRunner(ROUND)
    with running(runner, each, drafter=PromptLookup(OPTIONS), speculation=OPTIONS) as (_, answers):
        answers.wait(each)
    assert answers["r"].text == ROUND.decode()
    assert len(runner.steps) < len(ROUND) / 2


def test_one_step_gives_one_output() -> None:
    each = request(max_tokens=24, logprobs=1)
    expected = generate(each)["r"]
    right = Oracle(lambda sequence, count: expected.token_ids[sequence.num_output :][:count])
    answer = generate(each, drafter=right, speculation=OPTIONS)["r"]
    assert len(answer.pieces) == 5
    assert answer.logprobs == expected.logprobs


@pytest.mark.parametrize("asked", [1, 3, 40])
def test_a_request_says_how_far_is_guessed(asked: int) -> None:
    each = replace(request(max_tokens=120), assistance=Assistance(num_tokens=asked))
    wanted: list[int] = []

    def guess(sequence: Sequence, count: int) -> list[int]:
        wanted.append(count)
        return [7] * count

    generate(each, drafter=Oracle(guess), speculation=OPTIONS)
    assert wanted[0] == min(asked, 32)
    assert wanted[-1] == 0 or max(wanted) == wanted[0]


def test_a_cancelled_request_leaves_nothing_behind() -> None:
    each = request(max_tokens=200)
    drafter = draft_model()
    with running(FakeRunner(num_blocks=256), each, drafter=drafter, speculation=OPTIONS) as (engine, answers):
        eventually(lambda: "r" in answers)
        engine.cancel("r")
        eventually(lambda: engine.stats().running == 0)
        assert engine.stats().kv_cache_usage == 0
        last = request("last", max_tokens=3)
        engine.submit(last)
        answers.wait(last)
        assert {shadow.request.request_id for shadow in drafter._shadows} <= {"last"}


def test_a_step_that_fails_with_drafts_fails_only_the_culprit() -> None:
    def before_step(chunks: Any) -> None:
        if any(chunk.draft and chunk.sequence.request.request_id == "bad" for chunk in chunks):
            raise EngineError("the device failed in a step")

    requests = [request("good", max_tokens=20), request("bad", "b", max_tokens=20)]
    wrong = Oracle(lambda sequence, count: [7] * count)
    runner = FakeRunner(num_blocks=256, before_step=before_step)
    answers = generate(*requests, runner=runner, drafter=wrong, speculation=OPTIONS)
    assert answers["bad"].error is not None
    assert answers["good"].token_ids == generate(requests[0])["good"].token_ids


def test_a_draft_model_that_fails_is_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    each, broken = request(max_tokens=20), Broken()
    answer = generate(each, drafter=broken, speculation=OPTIONS)["r"]
    assert answer.token_ids == generate(each)["r"].token_ids
    assert broken.calls == 1
    assert "guessing ahead has failed" in caplog.text


class Priced(StepCost):
    """A step cost that is told."""

    def __init__(self, price: float) -> None:
        super().__init__()
        self.told = price

    def price(self, sequences: int, seconds_per_token: float = 0.0) -> float:
        return self.told


def lengths(right: list[bool], *, price: float, free: bool = True) -> list[int]:
    """Return how much was proposed in each of some steps; whether the drafts of a step prove right is told."""
    sequence = Sequence(GenerationRequest("r", (1,), SamplingParams(max_tokens=None)), 0)
    sequence.token_ids.append(1)
    sequence.num_computed = 1
    drafter = Oracle(lambda _, count: [5] * count)
    drafter.free = free
    speculation = Speculation(drafter, OPTIONS, lambda _: 10_000, Priced(price))
    found = []
    for each in right:
        proposed = len(speculation.propose([sequence]).get(sequence, ()))
        found.append(proposed)
        sequence.token_ids += [5] * (proposed + 1) if each else [6]
        sequence.num_computed = sequence.num_tokens - 1
    return found


def test_drafts_that_prove_right_become_longer_and_wrong_ones_shorter() -> None:
    found = lengths([True] * 8 + [False] * 12, price=0.5)
    assert found[0] == 1
    assert found[7] == 5
    assert found[-1] == 0


def test_what_costs_nothing_to_guess_is_tried_again_when_it_would_have_been_right() -> None:
    found = lengths([False] * 20 + [True] * 6, price=0.3)
    assert found[19] == 0
    assert sum(found[10:20]) == 0
    assert found[-1] > 0


def test_a_draft_model_is_tried_again_now_and_then() -> None:
    found = lengths([False] * 200, price=0.3, free=False)
    assert 2 <= sum(found[20:]) <= 6
    assert lengths([False] * 200 + [True] * 100, price=0.3, free=False)[-1] == 5


def test_what_is_dear_is_not_guessed() -> None:
    assert sum(lengths([True] * 30, price=1.01)) == 0


def test_a_new_sequence_begins_with_what_is_usual() -> None:
    options = replace(OPTIONS, num_tokens=1)
    drafter = Oracle(lambda _, count: [5] * count)
    speculation = Speculation(drafter, options, lambda _: 10_000, Priced(0.3))
    proposed = []
    for number in range(60):
        sequence = Sequence(GenerationRequest(str(number), (1,), SamplingParams(max_tokens=None)), 0)
        sequence.token_ids.append(1)
        sequence.num_computed = 1
        proposed.append(len(speculation.propose([sequence])))
        sequence.token_ids.append(6)
        sequence.num_computed = 2
        speculation.propose([sequence])
    assert (proposed[0], proposed[-1]) == (1, 0)


def test_drafts_of_one_kind_say_nothing_of_another() -> None:
    class TwoKinds(Oracle):
        def draft(self, wanted: Any) -> dict[Sequence, Draft]:
            return {s: Draft((5,) * count, kind=s.num_tokens % 2) for s, count in wanted.items()}

    sequence = Sequence(GenerationRequest("r", (1,), SamplingParams(max_tokens=None)), 0)
    sequence.token_ids.append(1)
    speculation = Speculation(TwoKinds(lambda *_: []), OPTIONS, lambda _: 10_000, Priced(0.4))
    found: dict[int, int] = {}
    for _ in range(60):
        sequence.num_computed = sequence.num_tokens - 1
        kind = sequence.num_tokens % 2
        found[kind] = len(speculation.propose([sequence]).get(sequence, ()))
        sequence.token_ids += [5] * 3 if kind else [6]
    assert (found[0], found[1]) == (0, 5)
