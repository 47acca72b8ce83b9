"""Engine: one thread that turns submitted requests into tokens, step by step.

    submit / cancel (any thread) ──► inbox ──► schedule ──► run ──► sample ──► deliver (engine thread)

Everything below the inbox belongs to the engine thread alone, so nothing there is locked. Knows no HTTP and no files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidFieldError,
    OvmsLoraError,
    QueueFullError,
    UnavailableError,
)
from ovms_lora.core.request import GenerationRequest, SequenceOutput
from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.runner import FloatArray, ModelRunner
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.scheduler import Chunk, Residency, Scheduler, SchedulerLimits
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Deliver = Callable[[Seq[SequenceOutput]], None]

T = TypeVar("T")

_IDLE_SECONDS = 0.5  # how often an idle engine shows that it is alive
_NO_ROOM_SECONDS = 0.01  # how long to wait when nothing that waits can be admitted
_STOP_SECONDS = 10.0  # longer than any step


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now (running, waiting, cache usage 0…1), and counters since its start."""

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Something to do between two steps; whoever wants it done waits for `result`."""

    work: Callable[[], Any]
    result: Future[Any]

    def run(self) -> None:
        try:
            value = self.work()
        except (OvmsLoraError, RuntimeError, MemoryError) as error:
            self.result.set_exception(error)
        else:
            self.result.set_result(value)


class Engine:
    """Runs one model. Start it once; requests come in by `submit`, outputs go out through `deliver`.

    `deliver` is called by the engine thread, once per step, with everything that the step brought; it must not block.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        options: EngineOptions,
        *,
        deliver: Deliver,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        max_waiting: int = 256,
        residency: Residency | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        eos = frozenset(eos_token_ids)
        self.max_model_len = min(max_model_len, runner.num_blocks * runner.block_size)
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        self._max_waiting = max_waiting
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(self._pool, _limits(options), residency)
        self._sampler = Sampler(eos)
        self._output = OutputProcessor(tokenizer, eos, self.max_model_len)
        self._live: dict[str, list[Sequence]] = {}
        self._inbox: deque[GenerationRequest | str] = deque()  # a string is the id of a request to cancel
        self._tasks: deque[_Task] = deque()
        self._wake = threading.Condition()
        self._draining = False
        self._abort = False
        self._failure: EngineError | None = None
        self._beat = clock()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; from any thread.

        Raises InvalidFieldError when the prompt does not fit, QueueFullError when too many requests wait,
        UnavailableError while stopping, EngineError after the engine has failed.
        """
        self.check(request)
        with self._wake:
            if self._failure:
                raise self._failure
            if self._draining:
                raise UnavailableError("the server is shutting down")
            if len(self._scheduler.waiting) + len(self._inbox) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already")
            self._inbox.append(request)
            self._wake.notify()

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidFieldError when a request can never run here."""
        prompt, limit = len(request.prompt_token_ids), self.max_model_len
        wanted = request.sampling.max_tokens
        if prompt == 0:
            raise InvalidFieldError("prompt is empty", param="prompt")
        if prompt > limit or (prompt == limit and wanted != 0):
            raise InvalidFieldError(
                f"Number of prompt tokens: {prompt} exceeds model max length: {limit}", param="prompt"
            )
        if wanted is not None and prompt + wanted > limit:
            message = (
                f"Number of prompt tokens: {prompt} + max tokens value: {wanted} exceeds model max length: {limit}"
            )
            raise InvalidFieldError(message, param="max_tokens")
        vocabulary = self._runner.vocab_size
        for field, tokens in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.sampling.stop_token_ids),
        ):
            if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
                raise InvalidFieldError(f"{field} holds a token id outside of 0 … {vocabulary - 1}", param=field)

    def cancel(self, request_id: str) -> None:
        """Drop a request, whatever its state; from any thread. Unknown ids are ended requests and do nothing."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def call(self, work: Callable[[], T]) -> T:
        """Do something on the engine thread, between two steps, and return its result; from any other thread.

        Raises what `work` raises, or UnavailableError when the engine has stopped.
        """
        task = _Task(work, Future())
        with self._wake:
            if self._draining:
                raise UnavailableError("the server is shutting down")
            self._tasks.append(task)
            self._wake.notify()
        result: T = task.result.result()
        return result

    def stats(self) -> EngineStats:
        """Return a snapshot; from any thread."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            kv_cache_usage=1 - pool.num_free / pool.num_blocks,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            preemptions=scheduler.num_preemptions,
        )

    def heartbeat_age(self) -> float:
        """Return the seconds since the engine thread last began a turn of its loop."""
        return self._clock() - self._beat

    def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those that run end for `drain_seconds`, end the rest, and join the thread.

        A step that hangs in the device is left behind: its daemon thread ends with the process.
        """
        with self._wake:
            self._draining = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(drain_seconds)
        with self._wake:
            self._abort = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(_STOP_SECONDS)
            if self._thread.is_alive():
                log.error("the engine did not stop within %.0f s", _STOP_SECONDS)

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            # The border of the thread: whatever it was, whoever waits must hear of it.
            log.exception("the engine has failed")
            self._fail(EngineError(f"the engine has failed: {type(error).__name__}"))
        finally:
            self._end_all(self._failure or UnavailableError("the server has stopped"))

    def _turn(self) -> bool:
        """Do what is to be done once; return whether to go on."""
        self._beat = self._clock()
        # Taken in even when it is time to go: `_end_all` tells only those of whom the engine knows.
        self._take_in(self._wait_for_work())
        while self._tasks:
            self._tasks[0].run()
            self._tasks.popleft()
        if self._abort or (self._draining and not self._scheduler.has_work):
            return False
        self._end_overdue()
        if self._scheduler.has_work:
            self._step()
        return True

    def _wait_for_work(self) -> list[GenerationRequest | str]:
        with self._wake:
            if not (self._inbox or self._tasks or self._scheduler.has_work or self._draining or self._abort):
                self._wake.wait(_IDLE_SECONDS)
            messages = list(self._inbox)
            self._inbox.clear()
            return messages

    def _take_in(self, messages: Iterable[GenerationRequest | str]) -> None:
        for message in messages:
            if isinstance(message, str):
                self._drop(self._live.get(message, ()))
                continue
            sequences = [Sequence(message, index) for index in range(message.sampling.n)]
            self._live[message.request_id] = sequences
            for sequence in sequences:
                self._output.add(sequence)
                self._scheduler.add(sequence)
            self._prompt_tokens += len(message.prompt_token_ids)

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        if not chunks:
            with self._wake:
                self._wake.wait(_NO_ROOM_SECONDS)
            return
        try:
            logits = self._runner.run(chunks)
        except EngineError as error:
            log.error("a step of %d sequences failed: %s", len(chunks), error)
            self._end([chunk.sequence for chunk in chunks], error)
            return
        self._scheduler.computed(chunks)
        outputs = self._sample(chunks, logits)
        ended = [sequence for sequence, output in outputs if output.finished]
        self._drop(ended)
        if outputs:
            self._deliver([output for _, output in outputs])

    def _sample(self, chunks: Seq[Chunk], logits: FloatArray) -> list[tuple[Sequence, SequenceOutput]]:
        rows: list[int] = []
        sampling: list[Sequence] = []
        outputs: list[tuple[Sequence, SequenceOutput]] = []
        end = 0
        for chunk in chunks:
            begin, end = end, end + chunk.num_sampled
            sequence = chunk.sequence
            if sequence.request.sampling.prompt_logprobs is not None and sequence.num_output == 0:
                self._output.prompt_rows(chunk, logits[begin:end])
            if chunk.samples and sequence.request.sampling.max_tokens == 0:
                outputs.append((sequence, self._output.without_tokens(sequence)))
            elif chunk.samples:
                rows.append(end - 1)
                sampling.append(sequence)
        if sampling:
            picked = logits if len(rows) == len(logits) else logits[rows]
            for sequence, sampled in zip(sampling, self._sampler.sample(picked, sampling), strict=True):
                if sampled is None:
                    error = EngineError("the model gave no finite logits")
                    outputs.append((sequence, self._output.failed(sequence, error)))
                else:
                    outputs.append((sequence, self._output.token(sequence, sampled)))
            self._generation_tokens += len(sampling)
        return outputs

    def _end_overdue(self) -> None:
        now = self._clock()
        for sequences in list(self._live.values()):
            deadline = sequences[0].request.deadline
            if deadline is not None and now > deadline:
                self._end(sequences, DeadlineExceededError("the request took longer than it may"))

    def _end(self, sequences: Iterable[Sequence], error: OvmsLoraError) -> None:
        """End whole requests with an error: all sequences of a request share its fate."""
        ids = dict.fromkeys(sequence.request.request_id for sequence in sequences)
        ending = [sequence for request_id in ids for sequence in self._live.get(request_id, ())]
        self._drop(ending)
        self._deliver([self._output.failed(sequence, error) for sequence in ending])

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        for sequence in list(sequences):
            siblings = self._live[sequence.request.request_id]
            siblings.remove(sequence)
            if not siblings:
                del self._live[sequence.request.request_id]
            self._scheduler.finish(sequence)
            self._output.drop(sequence)

    def _fail(self, error: EngineError) -> None:
        with self._wake:
            self._failure = error

    def _end_all(self, error: OvmsLoraError) -> None:
        with self._wake:
            self._draining = True
            messages = list(self._inbox)
            self._inbox.clear()
            for task in self._tasks:
                task.result.set_exception(error)
            self._tasks.clear()
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        self._live.clear()
        outputs = [self._output.failed(sequence, error) for sequence in live]
        outputs += [
            SequenceOutput(message.request_id, index, error=error)
            for message in messages
            if isinstance(message, GenerationRequest)
            for index in range(message.sampling.n)
        ]
        if outputs:
            self._deliver(outputs)


def _limits(options: EngineOptions) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        split_prefill=options.dynamic_split_fuse,
        prefix_caching=options.enable_prefix_caching,
    )
