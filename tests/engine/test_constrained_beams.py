"""Beam search within a constraint: every result matches, and a beam ends where its text is complete."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from ovms_lora.core.constraint import ConstraintKind
from ovms_lora.core.errors import InvalidFieldError
from ovms_lora.core.request import FinishReason, GenerationRequest
from tests.engine.harness import Answer, alone, generate, request
from tests.engine.test_constrained_sequences import PERSON, constrained
from tests.fakes import FakeRunner


def search(
    kind: ConstraintKind, source: str | tuple[str, ...], *, width: int = 3, name: str = "s", **sampling: Any
) -> GenerationRequest:
    each = request(name, **{"n": width, "beam_width": width, "max_tokens": 120, **sampling})
    return constrained(each, kind, source)


def found(each: GenerationRequest, **fields: Any) -> list[Answer]:
    answers = generate(each, **fields)
    return [answers.of(each.request_id, index) for index in range(each.sampling.n)]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("copies", [True, False])
def test_every_result_matches_the_schema(width: int, copies: bool) -> None:
    each = search(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON), width=width)
    results = found(each, runner=FakeRunner(num_blocks=256, copies_blocks=copies))
    assert len(set(texts(results))) == width
    for answer in results:
        assert answer.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), PERSON)


def test_a_search_is_the_same_without_room_and_in_company() -> None:
    each = search(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON), max_tokens=60)
    mates = [request(name, max_tokens=30) for name in "ab"]
    answers = generate(mates[0], each, mates[1], runner=FakeRunner(num_blocks=28), enable_prefix_caching=False)
    assert [answers.of("s", index).text for index in range(3)] == texts(found(each))
    for mate in mates:
        assert answers[mate.request_id].text == alone(mate)


def test_beams_end_one_by_one_as_their_texts_are_complete() -> None:
    results = found(search(ConstraintKind.CHOICE, ("a", "bcd", "efghi"), length_penalty=0.0))
    assert sorted(texts(results)) == ["a", "bcd", "efghi"]
    assert {answer.finish_reason for answer in results} == {FinishReason.STOP}


def test_max_tokens_cuts_beams_that_are_not_complete() -> None:
    results = found(search(ConstraintKind.REGEX, "[a-z]{20}", max_tokens=5))
    assert {(len(answer.text), answer.finish_reason) for answer in results} == {(5, FinishReason.LENGTH)}


def test_log_probabilities_stay_those_of_the_model() -> None:
    (answer,) = found(search(ConstraintKind.CHOICE, ("é",), n=1, width=2, logprobs=0))
    assert answer.text == "é"
    assert all(entry.logprob < -20 for entry in answer.logprobs)


def test_more_results_than_the_constraint_has_texts_are_refused() -> None:
    assert sorted(texts(found(search(ConstraintKind.CHOICE, ("a", "b"), n=2, width=4)))) == ["a", "b"]
    for answer in found(search(ConstraintKind.CHOICE, ("a", "b"), width=3)):
        assert isinstance(answer.error, InvalidFieldError)
        assert (answer.error.message, answer.error.param) == ("the constraint allows fewer than 3 texts", "n")


def test_a_constraint_that_becomes_too_complex_ends_the_search_alone() -> None:
    hopeless = search(ConstraintKind.GRAMMAR, 'root ::= "b" x\nx ::= "a" x')
    plain = request("plain")
    answers = generate(hopeless, plain)
    for index in range(3):
        error = answers.of("s", index).error
        assert isinstance(error, InvalidFieldError)
        assert "the text cannot follow its constraint any more" in error.message
    assert answers["plain"].text == alone(plain)
