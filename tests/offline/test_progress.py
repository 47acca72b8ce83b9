"""The bar says what vLLM's says."""

from __future__ import annotations

from typing import Any

import pytest

from ovms_lora.offline.outputs import CompletionOutput, RequestOutput
from ovms_lora.offline.progress import Progress


def answer(prompt: int, *completions: int) -> RequestOutput:
    outputs = [CompletionOutput(i, "", [0] * size, None, None, "stop") for i, size in enumerate(completions)]
    return RequestOutput("0", None, [0] * prompt, None, outputs, True)


class Bar:
    """Keeps what it is told."""

    made: dict[str, Any]

    def __init__(self, **made: Any) -> None:
        Bar.made, self.postfix, self.done, self.closed = made, made["postfix"], 0, False

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.closed = True


def test_the_speed_is_that_of_all_tokens_so_far() -> None:
    now = 10.0
    progress = Progress(Bar, 3, clock=lambda: now)
    bar = progress._bar
    assert Bar.made["desc"] == "Processed prompts"
    assert Bar.made["total"] == 3
    assert bar.postfix == "est. speed input: 0.00 toks/s, output: 0.00 toks/s"
    with progress:
        now = 12.0
        progress.add(answer(4, 10))
        assert bar.postfix == "est. speed input: 2.00 toks/s, output: 5.00 toks/s"
        progress.add(answer(3, 10, 10))  # vLLM counts a prompt once for each continuation
        assert bar.postfix == "est. speed input: 5.00 toks/s, output: 15.00 toks/s"
        assert (bar.done, bar.closed) == (2, False)
    assert bar.closed


def test_the_bar_is_tqdms_and_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 2) as progress:
        progress.add(answer(4, 10))
        progress.add(answer(4, 10))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Processed prompts: 100%" in err
    assert "est. speed input: " in err


def test_without_a_bar_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False, 2) as progress:
        progress.add(answer(4, 10))
    assert capsys.readouterr() == ("", "")
