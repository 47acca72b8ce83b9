"""Batch: the prompts of one call on their way through an engine that other calls may use at the same time.

    asks ──submit, as the engine's queue has room──► engine ──deliver──► OutputRouter ──by request id──► batch

Leaving the batch, in whatever way, cancels what is not done.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from ovms_lora.core.errors import QueueFullError
from ovms_lora.core.request import AdapterUse, GenerationRequest, SequenceOutput
from ovms_lora.engine.engine import Engine
from ovms_lora.offline.lora_request import LoRARequest
from ovms_lora.offline.outputs import RequestOutput, TokenText, completion_output, prompt_logprobs

_NO_ROOM_SECONDS = 0.02  # how long to wait for an output of one's own while others fill the engine's queue

Mailbox = queue.SimpleQueue[list[SequenceOutput]]


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt that is known to fit: the request, without adapters, and what its answer repeats."""

    request: GenerationRequest
    text: str | None
    lora_request: LoRARequest | None


class OutputRouter:
    """An engine's `deliver`: sorts outputs into the mailboxes of the calls that wait for them, and drops the rest."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}

    def open(self, request_id: str, mailbox: Mailbox) -> None:
        """Send a request's outputs to a mailbox from now on."""
        self._mailboxes[request_id] = mailbox

    def close(self, request_id: str) -> None:
        """Drop what may still come for a request."""
        self._mailboxes.pop(request_id, None)

    def __call__(self, outputs: Sequence[SequenceOutput]) -> None:
        """Take the outputs of one step; does not block."""
        sorted_out: dict[Mailbox, list[SequenceOutput]] = {}
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                sorted_out.setdefault(mailbox, []).append(output)
        for mailbox, its_outputs in sorted_out.items():
            mailbox.put(its_outputs)


@dataclass(slots=True)
class _Answer:
    """What has come for one ask: the steps of each of its sequences, by index."""

    ask: Ask
    steps: dict[int, list[SequenceOutput]] = field(default_factory=dict)
    num_finished: int = 0

    def add(self, output: SequenceOutput) -> bool:
        """Take one output; return whether it was the last one of the request."""
        self.steps.setdefault(output.index, []).append(output)
        self.num_finished += output.finished
        return self.num_finished == self.ask.request.sampling.n

    def output(self, token_text: TokenText) -> RequestOutput:
        """Return the whole answer."""
        request, lora = self.ask.request, self.ask.lora_request
        wanted = request.sampling.logprobs is not None
        sequences = [self.steps[index] for index in sorted(self.steps)]
        first = sequences[0][0]
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.ask.text,
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=prompt_logprobs(first.prompt_logprobs, token_text),
            outputs=[completion_output(steps, token_text, lora, with_logprobs=wanted) for steps in sequences],
            finished=True,
            lora_request=lora,
            num_cached_tokens=first.cached_tokens,
        )


class Batch:
    """Iterate over it, within `with`, for the answers in the order in which they are done.

    `uses` says what a LoRARequest stands for. An error that the engine delivers, or that `uses` raises, ends it all.
    """

    def __init__(
        self,
        engine: Engine,
        router: OutputRouter,
        asks: Iterable[Ask],
        *,
        uses: Callable[[LoRARequest], tuple[AdapterUse, ...]],
        token_text: TokenText,
    ) -> None:
        self._engine, self._router, self._uses, self._token_text = engine, router, uses, token_text
        self._waiting = deque(asks)
        self._open: dict[str, _Answer] = {}
        self._mailbox: Mailbox = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for request_id in self._open:
            self._router.close(request_id)
            self._engine.cancel(request_id)

    def __iter__(self) -> Iterator[RequestOutput]:
        while self._waiting or self._open:
            self._submit()
            for output in self._received():
                if output.error:
                    raise output.error
                answer = self._open[output.request_id]
                if answer.add(output):
                    self._leave(output.request_id)
                    yield answer.output(self._token_text)

    def _submit(self) -> None:
        while self._waiting:
            ask = self._waiting[0]
            adapters = self._uses(ask.lora_request) if ask.lora_request else ()
            request = replace(ask.request, adapters=adapters)
            # Known before it is submitted, so that an interrupt at any time cancels it.
            self._open[request.request_id] = _Answer(ask)
            self._router.open(request.request_id, self._mailbox)
            try:
                self._engine.submit(request)
            except QueueFullError:
                self._leave(request.request_id)
                return
            self._waiting.popleft()

    def _received(self) -> list[SequenceOutput]:
        try:
            return self._mailbox.get(timeout=_NO_ROOM_SECONDS if self._waiting else None)
        except queue.Empty:
            return []

    def _leave(self, request_id: str) -> None:
        self._router.close(request_id)
        del self._open[request_id]
