"""SamplingParams refuses values that make no sense, in vLLM's words."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.core.sampling_params import SamplingParams

NAN, INFINITY = float("nan"), float("inf")


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.stop, params.seed) == (16, 0, (), None)
    assert params.skip_special_tokens
    assert not params.greedy


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"max_tokens": None},
        {"max_tokens": 0},
        {"max_tokens": None, "min_tokens": 99},
        {"min_tokens": 16},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-3},
        {"seed": 0},
        {"seed": 2**64},
        {"logprobs": 0},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"logit_bias": {1: -100.0}},
        {"beam_width": 4, "length_penalty": 0.5},
    ],
)
def test_values_are_accepted(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert all(getattr(params, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0."),
        ({"temperature": -0.1}, "temperature must be non-negative, got -0.1."),
        ({"temperature": NAN}, "sampling values must be finite numbers."),
        ({"temperature": INFINITY}, "sampling values must be finite numbers."),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0."),
        ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01."),
        ({"top_p": NAN}, "sampling values must be finite numbers."),
        ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1."),
        ({"min_p": 1.1}, "min_p must be in [0, 1], got 1.1."),
        ({"seed": -1}, "seed must be non-negative, got -1."),
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1."),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2, 2], got -2.1."),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than zero, got 0."),
        ({"repetition_penalty": -1}, "repetition_penalty must be greater than zero, got -1."),
        ({"repetition_penalty": NAN}, "repetition_penalty must be greater than zero, got nan."),
        ({"repetition_penalty": INFINITY}, "repetition_penalty must be greater than zero, got inf."),
        ({"max_tokens": -1}, "max_tokens must not be negative, got -1."),
        ({"min_tokens": -1}, "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": 17}, "min_tokens must be less than or equal to max_tokens=16, got 17."),
        ({"stop": ("a", "")}, "stop cannot contain an empty string."),
        ({"stop": ""}, "stop cannot contain an empty string."),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21."),
        ({"logprobs": -1}, "logprobs must be between 0 and 20, got -1."),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be between 0 and 20, got 21."),
        ({"logit_bias": {1: NAN}}, "logit_bias must hold finite numbers."),
        ({"beam_width": 0}, "beam_width must be at least 1, got 0."),
        ({"beam_width": 2, "n": 3}, "n must be less than or equal to beam_width=2, got 3."),
        ({"length_penalty": float("inf")}, "sampling values must be finite numbers."),
    ],
)
def test_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as refused:
        SamplingParams(**values)
    assert str(refused.value) == message


@pytest.mark.parametrize(("stop", "stops"), [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_is_one_string_or_several(stop: Any, stops: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop == stops


def test_stop_token_ids_can_be_a_list() -> None:
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)


def test_none_is_the_same_as_nothing_given() -> None:
    nothing: Any = None
    assert SamplingParams(stop=nothing, stop_token_ids=nothing, logit_bias=nothing) == SamplingParams()


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
