"""Runs requests through a real engine thread over a fake device, and collects what comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import OvmsLoraError
from ovms_lora.core.request import (
    AdapterUse,
    FinishReason,
    GenerationRequest,
    SequenceOutput,
    TokenLogprob,
)
from ovms_lora.core.sampling_params import SamplingParams
from ovms_lora.engine.drafts import Drafter
from ovms_lora.engine.engine import Engine
from ovms_lora.engine.runner import FloatArray
from ovms_lora.engine.scheduler import Chunk
from ovms_lora.engine.sequence import Sequence as EngineSequence
from tests.engine.stepping import FakeAdapter
from tests.fakes import EOS, FakeRunner, byte_tokenizer

TOKENIZER = byte_tokenizer()
SECONDS = 20.0


@dataclass
class Answer:
    """All that came for one sequence."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[tuple[TokenLogprob | None, ...]] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: OvmsLoraError | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def add(self, output: SequenceOutput) -> None:
        assert not self.finished, "an output after the end"
        self.pieces.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.append(output.prompt_logprobs)
        self.cached_tokens = output.cached_tokens
        self.finish_reason, self.stop_reason, self.error = output.finish_reason, output.stop_reason, output.error


class Answers:
    """An engine's `deliver`; a test waits on it for the end of requests."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, int], Answer] = {}
        self._changed = threading.Condition()

    def __call__(self, outputs: Sequence[SequenceOutput]) -> None:
        with self._changed:
            for output in outputs:
                self._answers.setdefault((output.request_id, output.index), Answer()).add(output)
            self._changed.notify_all()

    def __getitem__(self, request_id: str) -> Answer:
        return self.of(request_id, 0)

    def of(self, request_id: str, index: int) -> Answer:
        return self._answers[request_id, index]

    def __contains__(self, request_id: str) -> bool:
        return (request_id, 0) in self._answers

    def forget(self, request_id: str) -> None:
        """Make room for another request of the same id."""
        self._answers = {key: answer for key, answer in self._answers.items() if key[0] != request_id}

    def wait(self, *requests: GenerationRequest) -> None:
        keys = [(request.request_id, index) for request in requests for index in range(request.sampling.n)]
        with self._changed:
            ended = self._changed.wait_for(
                lambda: all(key in self._answers and self._answers[key].finished for key in keys), SECONDS
            )
        assert ended, "the engine gave no answer"


class AnyAdapters:
    """A residency with room for everything."""

    def acquire(self, sequence: EngineSequence) -> bool:
        return True

    def release(self, sequence: EngineSequence) -> None:
        pass


class ScriptedRunner(FakeRunner):
    """Writes the given bytes, one token each, then EOS."""

    def __init__(self, script: bytes, **kwargs: Any) -> None:
        super().__init__(num_blocks=256, **kwargs)
        self._script = script

    def _logits(self, context: list[int], chunk: Chunk) -> FloatArray:
        row = np.full(self.vocab_size, -30.0, np.float32)
        place = len(context) - chunk.sequence.num_prompt
        row[self._script[place] if 0 <= place < len(self._script) else EOS] = 30.0
        return row


def request(
    name: str = "r",
    prompt: str | Sequence[int] = "hello",
    *,
    adapter: str = "",
    salt: str = "",
    deadline: float | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """Return a request, greedy unless it says otherwise."""
    token_ids = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
    adapters = (AdapterUse(FakeAdapter(adapter)),) if adapter else ()
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **sampling})
    return GenerationRequest(name, token_ids, params, adapters, salt, deadline)


def build(
    answers: Answers,
    runner: FakeRunner,
    *,
    max_model_len: int = 256,
    max_waiting: int = 256,
    clock: Callable[[], float] = time.monotonic,
    residency: AnyAdapters | None = None,
    drafter: Drafter | None = None,
    **options: Any,
) -> Engine:
    """Return an engine that is not started yet."""
    return Engine(
        runner,
        TOKENIZER,
        EngineOptions(**options),
        deliver=answers,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
        max_waiting=max_waiting,
        residency=residency or AnyAdapters(),
        drafter=drafter,
        clock=clock,
    )


@contextmanager
def running(runner: FakeRunner, *first: GenerationRequest, **options: Any) -> Iterator[tuple[Engine, Answers]]:
    """Start an engine that finds the `first` requests in its inbox; stop it at the end."""
    answers = Answers()
    engine = build(answers, runner, **options)
    for each in first:
        engine.submit(each)
    engine.start()
    try:
        yield engine, answers
    finally:
        runner.gate.set()
        engine.stop()


def generate(*requests: GenerationRequest, runner: FakeRunner | None = None, **options: Any) -> Answers:
    """Run requests that arrive together to their end."""
    with running(runner or FakeRunner(num_blocks=256), *requests, **options) as (engine, answers):
        answers.wait(*requests)
        assert engine.stats().kv_cache_usage == 0
    return answers


def alone(each: GenerationRequest) -> str:
    """Return the text of a request that has an engine to itself, without any cache."""
    return generate(each, enable_prefix_caching=False)[each.request_id].text


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail when it takes too long."""
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.002)
