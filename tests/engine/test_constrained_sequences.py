"""Constrained sequences in the engine: what is chosen, when they end, and beside whom."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from ovms_lora.core.constraint import BoolArray, ConstraintKind, ConstraintSpec
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.core.request import FinishReason, GenerationRequest
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.structured import ConstraintCompiler
from tests.engine.harness import TOKENIZER, ScriptedRunner, alone, generate, request
from tests.fakes import EOS, FakeRunner

COMPILER = ConstraintCompiler(TOKENIZER, [EOS])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def constrained(each: GenerationRequest, kind: ConstraintKind, source: str | tuple[str, ...]) -> GenerationRequest:
    return replace(each, constraint=COMPILER.compile(ConstraintSpec(kind, source), param="field"))


def person(name: str, **sampling: Any) -> GenerationRequest:
    each = request(name, f"about {name}", **{"max_tokens": 120, **sampling})
    return constrained(each, ConstraintKind.JSON_SCHEMA, json.dumps(PERSON))


def regex(source: str, *, name: str = "r", **sampling: Any) -> GenerationRequest:
    return constrained(request(name, **sampling), ConstraintKind.REGEX, source)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_each_of_n_sequences_matches_on_its_own(temperature: float) -> None:
    answers = generate(person("p", n=5, temperature=temperature, seed=3))
    texts = [answers.of("p", index).text for index in range(5)]
    for index, text in enumerate(texts):
        jsonschema.validate(json.loads(text), PERSON)
        assert answers.of("p", index).finish_reason is FinishReason.STOP
    if temperature:
        assert len(set(texts)) > 1


def test_beside_a_constrained_sequence_a_plain_one_writes_what_it_writes_alone() -> None:
    plain = request("plain", max_tokens=40)
    answers = generate(person("a"), plain, person("b", temperature=1.0, seed=1))
    assert answers["plain"].text == alone(plain)
    for name in "ab":
        jsonschema.validate(json.loads(answers[name].text), PERSON)


def test_a_constrained_text_is_the_same_in_any_company() -> None:
    each = person("p", temperature=1.0, seed=7)
    assert generate(each, *(request(str(i), max_tokens=30) for i in range(5)))["p"].text == alone(each)


def test_a_preempted_sequence_goes_on_where_it_was() -> None:
    each = [person(name, temperature=1.0, seed=1, max_tokens=60) for name in "abcd"]
    small = FakeRunner(num_blocks=24)
    answers = generate(*each, runner=small, enable_prefix_caching=False)
    recomputed = [step for step in small.steps for _, _, start, count in step if start == 0 and count > len("about a")]
    assert recomputed, "the device was large enough for all"
    for one in each:
        assert answers[one.request_id].text == alone(one)


def test_a_complete_text_ends_at_once() -> None:
    answer = generate(regex("[a-z]{3}"))["r"]
    assert len(answer.text) == 3
    assert (answer.finish_reason, answer.stop_reason, len(answer.token_ids)) == (FinishReason.STOP, None, 3)


def test_a_text_that_may_go_on_ends_by_eos_where_the_constraint_allows_it() -> None:
    answer = generate(regex("(ab)*"), runner=ScriptedRunner(b"abab"))["r"]
    assert (answer.text, answer.finish_reason, answer.token_ids[-1]) == ("abab", FinishReason.STOP, EOS)


def test_eos_waits_for_the_end_of_the_text() -> None:
    answer = generate(regex("ab(cd)?"), runner=ScriptedRunner(b"a"))["r"]
    assert (answer.text, answer.finish_reason) == ("ab", FinishReason.STOP)


def test_max_tokens_cuts_a_text() -> None:
    answer = generate(regex("a{20}", max_tokens=5))["r"]
    assert (answer.text, answer.finish_reason) == ("aaaaa", FinishReason.LENGTH)


def test_a_text_that_is_complete_with_its_last_token_is_not_cut() -> None:
    answer = generate(regex("a{5}", max_tokens=5))["r"]
    assert (answer.text, answer.finish_reason) == ("aaaaa", FinishReason.STOP)


def test_min_tokens_keeps_a_text_going_as_long_as_it_may() -> None:
    assert len(generate(regex("[a-z]*", min_tokens=8), runner=ScriptedRunner(b"abc"))["r"].text) >= 8
    answer = generate(regex("[a-z]{2}", min_tokens=8))["r"]
    assert (len(answer.text), answer.finish_reason) == (2, FinishReason.STOP)
    empty = generate(regex("", min_tokens=8))["r"]
    assert (empty.text, empty.finish_reason) == ("", FinishReason.STOP)


def test_an_ignored_eos_does_not_end_a_text_that_may_go_on() -> None:
    answer = generate(regex("[a-z]*", ignore_eos=True), runner=ScriptedRunner(b"abc"))["r"]
    assert (len(answer.text), answer.finish_reason) == (12, FinishReason.LENGTH)
    assert generate(regex("abc", ignore_eos=True))["r"].finish_reason is FinishReason.STOP


def test_stop_strings_and_stop_tokens_end_a_constrained_text_too() -> None:
    answer = generate(regex("x[0-9]*", stop=("12",)), runner=ScriptedRunner(b"x312456"))["r"]
    assert (answer.text, answer.stop_reason) == ("x3", "12")
    answer = generate(regex("x[0-9]*", stop_token_ids=(ord("4"),)), runner=ScriptedRunner(b"x312456"))["r"]
    assert (answer.text, answer.stop_reason) == ("x312", ord("4"))


def test_a_constraint_that_becomes_too_complex_ends_its_request_alone() -> None:
    hopeless = constrained(request("r"), ConstraintKind.GRAMMAR, 'root ::= "b" x\nx ::= "a" x')
    plain = request("plain")
    answers = generate(hopeless, plain)
    assert isinstance(answers["r"].error, InvalidFieldError)
    assert "the text cannot follow its constraint any more" in answers["r"].error.message
    assert answers["plain"].text == alone(plain)


# The sampler by itself.


class Only:
    """Allows some tokens, and notes what it is told."""

    finished = False
    failure = None

    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens
        self.accepted: list[int] = []

    def matcher(self) -> Only:
        return self

    def allowed(self, width: int) -> BoolArray:
        allowed = np.zeros(width, np.bool_)
        allowed[list(self._tokens)] = True
        return allowed

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def fork(self) -> Only:
        return self


def chosen(only: Only, row: list[float], **sampling: Any) -> int | None:
    params = SamplingParams(**{"temperature": 0.0, **sampling})
    sequence = Sequence(GenerationRequest("r", (0,), params, constraint=only), 0)
    (sampled,) = Sampler([4]).sample(np.array([row], np.float32), [sequence])
    return sampled.token_id if sampled else None


def test_the_best_allowed_token_is_chosen_and_told_to_the_matcher() -> None:
    only = Only(1, 2)
    assert chosen(only, [9, 1, 3, 8, 7]) == 2
    assert only.accepted == [2]


def test_penalties_and_biases_come_before_what_is_allowed() -> None:
    assert chosen(Only(0, 1), [3, 2, 0, 0, 0], repetition_penalty=2.0) == 1
    assert chosen(Only(1, 2), [9, 1, 3, 8, 7], logit_bias={1: 5.0, 0: 100.0}) == 1


def test_log_probabilities_stay_those_of_the_model() -> None:
    sequence = Sequence(GenerationRequest("r", (0,), SamplingParams(temperature=0, logprobs=1), constraint=Only(1)), 0)
    (sampled,) = Sampler().sample(np.array([[0.0, -1.0]], np.float32), [sequence])
    assert sampled
    assert sampled.logprob
    assert sampled.logprob.logprob == pytest.approx(-1.3133, abs=1e-3)
    assert sampled.logprob.top[0][0] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn(temperature: float) -> None:
    for seed in range(20):
        assert chosen(Only(1, 3), [9, 1, 30, 0.5, 8], temperature=temperature, seed=seed, top_p=0.9) in (1, 3)


def test_nothing_allowed_is_nothing_chosen() -> None:
    only = Only()
    assert chosen(only, [1, 2, 3, 4, 5]) is None
    assert only.accepted == []


def test_an_eos_held_back_is_chosen_when_nothing_else_is_allowed() -> None:
    assert chosen(Only(2, 4), [0, 0, 1, 0, 9], min_tokens=5) == 2
    assert chosen(Only(4), [0, 0, 1, 0, 9], min_tokens=5) == 4
    assert chosen(Only(2, 4), [0, 0, 1, 0, 9], ignore_eos=True) == 2
    assert chosen(Only(4), [0, 0, 1, 0, 9], ignore_eos=True) == 4
