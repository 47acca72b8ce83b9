"""Progress: a bar over the prompts of one call, with vLLM's estimate of tokens per second. Knows no engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ovms_lora.offline.outputs import RequestOutput

# Whether to show a bar, or what makes one: tqdm, or something that is called as tqdm is.
ShowProgress = bool | Callable[..., Any]


class Progress:
    """Shows how many prompts are done. Without `show` it does nothing."""

    def __init__(self, show: ShowProgress, total: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._begin = clock, clock()
        self._input_tokens = self._output_tokens = 0
        self._bar = _bar(show, total, self._speed())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, output: RequestOutput) -> None:
        """Count a prompt that is done."""
        if self._bar is None:
            return
        self._input_tokens += len(output.prompt_token_ids) * len(output.outputs)
        self._output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._bar.postfix = self._speed()
        self._bar.update(1)

    def _speed(self) -> str:
        seconds = max(self._clock() - self._begin, 1e-6)
        spent, made = self._input_tokens / seconds, self._output_tokens / seconds
        return f"est. speed input: {spent:.2f} toks/s, output: {made:.2f} toks/s"


def _bar(show: ShowProgress, total: int, speed: str) -> Any:
    if not show:
        return None
    return _maker(show)(total=total, desc="Processed prompts", dynamic_ncols=True, postfix=speed)


def _maker(show: ShowProgress) -> Callable[..., Any]:
    if not isinstance(show, bool):
        return show
    from tqdm.auto import tqdm  # in notebooks it is another one

    made: Callable[..., Any] = tqdm
    return made
