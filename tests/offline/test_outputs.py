"""What the engine delivers, put together in vLLM's shapes."""

from __future__ import annotations

import pytest

from ovms_lora.core.request import FinishReason, SequenceOutput, TokenLogprob
from ovms_lora.offline.outputs import CompletionOutput, Logprob, completion_output, prompt_logprobs

STEPS = [
    SequenceOutput("r", 2, token_ids=(5,), logprobs=(TokenLogprob(5, -1.0, ((5, -1.0), (6, -2.0))),)),
    SequenceOutput("r", 2, "ab", (7, 8), (TokenLogprob(7, -3.0, ((6, -0.5),), 9), TokenLogprob(8, -0.25, (), 1))),
    SequenceOutput("r", 2, "c", finish_reason=FinishReason.STOP, stop_reason="d"),
]


def text(token_id: int) -> str:
    return f"<{token_id}>"


def test_steps_become_one_completion() -> None:
    assert completion_output(STEPS, text, None, with_logprobs=False) == CompletionOutput(
        index=2,
        text="abc",
        token_ids=[5, 7, 8],
        cumulative_logprob=None,
        logprobs=None,
        finish_reason="stop",
        stop_reason="d",
    )


def test_the_chosen_token_comes_first_and_the_alternatives_have_ranks() -> None:
    completion = completion_output(STEPS, text, None, with_logprobs=True)
    assert completion.cumulative_logprob == pytest.approx(-4.25)
    assert completion.logprobs == [
        {5: Logprob(-1.0, 1, "<5>"), 6: Logprob(-2.0, 2, "<6>")},
        {7: Logprob(-3.0, 9, "<7>"), 6: Logprob(-0.5, 1, "<6>")},
        {8: Logprob(-0.25, 1, "<8>")},
    ]
    assert [list(found) for found in completion.logprobs] == [[5, 6], [7, 6], [8]]


def test_reasons_are_plain_strings() -> None:
    assert type(completion_output(STEPS, text, None, with_logprobs=False).finish_reason) is str


def test_the_first_token_of_a_prompt_has_no_logprob() -> None:
    assert prompt_logprobs(None, text) is None
    assert prompt_logprobs([None, TokenLogprob(3, -1.5, (), 4)], text) == [None, {3: Logprob(-1.5, 4, "<3>")}]
