"""Engine: one thread that turns submitted requests into tokens, step by step.

    submit / cancel (any thread) ──► inbox ──► schedule ──► run ──► sample ──► deliver (engine thread)

Everything below the inbox belongs to the engine thread alone, so nothing there is locked. Knows no HTTP and no files.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

from ovms_lora.core.config import EngineOptions
from ovms_lora.core.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidFieldError,
    NoMemoryError,
    OvmsLoraError,
    UnavailableError,
)
from ovms_lora.core.request import GenerationRequest, SequenceOutput
from ovms_lora.engine.bisection import StepResult, run_step
from ovms_lora.engine.block_pool import BlockPool
from ovms_lora.engine.decoder import Decoder
from ovms_lora.engine.drafts import Drafter
from ovms_lora.engine.inbox import MOST_SEQUENCES, Inbox
from ovms_lora.engine.live_requests import LiveRequests, failures
from ovms_lora.engine.output import OutputProcessor
from ovms_lora.engine.runner import ModelRunner
from ovms_lora.engine.sampler import Sampler
from ovms_lora.engine.scheduler import Residency, Scheduler, SchedulerLimits
from ovms_lora.engine.sequence import Sequence
from ovms_lora.engine.speculation import Speculation, SpeculationStats
from ovms_lora.engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Deliver = Callable[[Seq[SequenceOutput]], None]

T = TypeVar("T")

_NO_ROOM_SECONDS = 0.01  # how long to wait when nothing that waits can be admitted
_STOP_SECONDS = 10.0  # longer than any step


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now: sequences that run, requests that wait, cache usage 0…1; counters since its start."""

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    speculation: SpeculationStats | None = None


class Engine:
    """Runs one model. Start it once; requests come in by `submit`, outputs go out through `deliver`.

    `deliver` is called by the engine thread, once per step, with everything that the step brought; it must not block.
    `drafter` guesses ahead as the options' `speculation` says.
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
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        eos = frozenset(eos_token_ids)
        self.max_model_len = min(max_model_len, runner.num_blocks * runner.block_size)
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        self._inbox = Inbox(max_waiting)
        self._taken: deque[GenerationRequest | str] = deque()  # one that breaks the engine stays, to be told
        self._pool = BlockPool(runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(self._pool, _limits(options), residency, copies_blocks=runner.copies_blocks)
        output = OutputProcessor(tokenizer, eos, self.max_model_len)
        self._live = LiveRequests(self._scheduler, output, self._inbox.ended)
        self._decoder = Decoder(self._live, Sampler(eos), output)
        self._speculation = (
            Speculation(drafter, options.speculation, output.most_tokens) if drafter and options.speculation else None
        )
        self._abort = False
        self._failure: EngineError | None = None
        self._beat = clock()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, *requests: GenerationRequest) -> None:
        """Queue the requests of one call, which have one owner: all of them or, when it raises, none; from any thread.

        Raises InvalidFieldError when a prompt does not fit or an id is in use, QueueFullError when too many requests
        wait, UnavailableError while stopping, EngineError after the engine has failed.
        """
        for request in requests:
            self.check(request)
        waiting = self._scheduler.waiting
        self._inbox.submit(*requests, behind=waiting.backlog, own=waiting.backlog_of(requests[0].owner))

    def check_room(self, owner: str, queue_share: float) -> None:
        """Raise QueueFullError when the queue has no room for a request of this owner; from any thread."""
        waiting = self._scheduler.waiting
        self._inbox.check_room(owner, queue_share, waiting.backlog, waiting.backlog_of(owner))

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
        if request.sampling.n > MOST_SEQUENCES:
            raise InvalidFieldError(f"n must be at most {MOST_SEQUENCES}", param="n")
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
        self._inbox.cancel(request_id)

    def call(self, work: Callable[[], T]) -> T:
        """Do something on the engine thread, between two steps, and return its result; from any other thread.

        Raises what `work` raises, or UnavailableError when the engine has stopped.
        """
        return self._inbox.call(work)

    def stats(self) -> EngineStats:
        """Return a snapshot; from any thread."""
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.waiting.backlog.requests + self._inbox.num_requests,
            kv_cache_usage=1 - pool.num_free / pool.num_blocks,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.blocks.prefix_queries,
            prefix_cache_hits=scheduler.blocks.prefix_hits,
            preemptions=scheduler.num_preemptions,
            speculation=self._speculation.stats if self._speculation else None,
        )

    def heartbeat_age(self) -> float:
        """Return the seconds since the engine thread last began a turn of its loop; infinite when it has failed."""
        return math.inf if self._failure else self._clock() - self._beat

    def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those that run end for `drain_seconds`, end the rest, and join the thread.

        A step that hangs in the device is left behind: its daemon thread ends with the process.
        """
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join(drain_seconds)
        self._abort = True
        self._inbox.close()
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
            self._failure = EngineError(f"the engine has failed: {type(error).__name__}")
            self._inbox.fail(self._failure)
        finally:
            self._end_all(self._failure or UnavailableError("the server has stopped"))

    def _turn(self) -> bool:
        """Do what is to be done once; return whether to go on."""
        self._beat = self._clock()
        # Taken in even when it is time to go: `_end_all` tells only those of whom the engine knows.
        self._taken.extend(self._inbox.take(idle=not self._scheduler.has_work))
        self._take_in()
        self._inbox.run_tasks()
        if self._abort or (self._inbox.closed and not self._scheduler.has_work):
            return False
        self._fail(self._live.overdue(self._clock()), DeadlineExceededError("the request took longer than it may"))
        if self._scheduler.has_work:
            self._step()
        return True

    def _take_in(self) -> None:
        while self._taken:
            message = self._taken[0]
            if isinstance(message, GenerationRequest):
                self._live.begin(message)
                self._prompt_tokens += len(message.prompt_token_ids)
            else:
                self._live.end(message)
            self._taken.popleft()

    def _step(self) -> None:
        chunks = self._scheduler.schedule(self._propose())
        self._runner.copy_blocks(self._scheduler.copies)
        if self._scheduler.refused:
            self._fail_each(self._scheduler.refused)
            return  # siblings of theirs may be in the plan
        if not chunks:
            self._inbox.wait(_NO_ROOM_SECONDS)
            return
        begun = time.perf_counter()
        step = run_step(self._runner, chunks)
        seconds = time.perf_counter() - begun
        self._fail_each(step.failures)
        self._scheduler.computed(step.chunks)
        outputs = self._decode(step)
        if self._speculation:
            self._scheduler.accepted(step.chunks)
            self._speculation.observe(step.chunks, seconds)
        self._generation_tokens += sum(len(output.token_ids) for output in outputs)
        if outputs:
            self._deliver(outputs)

    def _propose(self) -> dict[Sequence, tuple[int, ...]] | None:
        return self._speculation.propose(self._scheduler.running) if self._speculation else None

    def _decode(self, step: StepResult) -> list[SequenceOutput]:
        try:
            return self._decoder.decode(step.chunks, step.logits)
        except MemoryError:
            # Which tokens were chosen before is lost, so nobody in this step can go on, or is told of an end.
            error = NoMemoryError("no memory to choose the next tokens")
            requests = {chunk.sequence.request.request_id: chunk.sequence.request for chunk in step.chunks}
            log.exception("%d requests failed: %s", len(requests), error)
            self._live.fail(requests, error)
            return [
                each for request in requests.values() for each in failures(request, range(request.sampling.n), error)
            ]

    def _fail(self, request_ids: Iterable[str], error: OvmsLoraError) -> None:
        """End whole requests with an error: all sequences of a request share its fate."""
        outputs = self._live.fail(request_ids, error)
        if outputs:
            self._deliver(outputs)

    def _fail_each(self, failures: Mapping[str, EngineError]) -> None:
        for request_id, error in failures.items():
            log.error("request %s failed: %s", request_id, _told(error))
            self._fail([request_id], error)

    def _end_all(self, error: OvmsLoraError) -> None:
        outputs = self._live.abandon(error)
        for request in (*self._taken, *self._inbox.empty(error)):
            if isinstance(request, GenerationRequest):
                outputs += failures(request, range(request.sampling.n), error)
        if outputs:
            self._deliver(outputs)


def _told(error: EngineError) -> str:
    """Return what the log says of an error: what the device said too, which is not for clients."""
    return f"{error.message}: {error.__cause__}" if error.__cause__ else error.message


def _limits(options: EngineOptions) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        split_prefill=options.dynamic_split_fuse,
        prefix_caching=options.enable_prefix_caching,
    )
