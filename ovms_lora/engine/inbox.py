"""Inbox: where other threads leave what they want of the engine, and the only lock in it.

    submit / cancel / call (any thread) ──► inbox ──► take / run_tasks (engine thread)

Knows nothing of the queues behind it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ovms_lora.core.errors import (
    EngineError,
    InvalidFieldError,
    OvmsLoraError,
    QueueFullError,
    UnavailableError,
)
from ovms_lora.core.request import GenerationRequest
from ovms_lora.engine.waiting_queue import Backlog

T = TypeVar("T")

MOST_SEQUENCES = 4096  # that wait: each has its own copy of the prompt, so requests alone do not bound the memory
_NOTHING = Backlog()
_IDLE_SECONDS = 0.5  # how often an idle engine shows that it is alive


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


class Inbox:
    """Takes requests, cancellations and tasks. With `max_waiting` requests waiting, here and behind, it is full;
    for an owner with a share of the queue when so much of its own waits.

    It knows the ids of all requests that have not ended, so that no two of them have one id.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._messages: deque[GenerationRequest | str] = deque()  # a string is the id of a request to cancel
        self._tasks: deque[_Task] = deque()
        self._ids: set[str] = set()
        self._changed = threading.Condition()
        self._failure: EngineError | None = None
        self.closed = False

    @property
    def num_requests(self) -> int:
        """How many requests have not been taken yet; from any thread."""
        with self._changed:
            return self._count()

    def submit(self, *requests: GenerationRequest, behind: Backlog = _NOTHING, own: Backlog = _NOTHING) -> None:
        """Leave the requests of one call, which have one owner: all of them, or none when one is refused.

        `behind` is what waits behind the inbox, and `own` what of that is of the same owner. Raises QueueFullError,
        InvalidFieldError when a request with such an id has not ended, UnavailableError after `close`, EngineError
        after `fail`.
        """
        with self._changed:
            if self._failure:
                raise self._failure
            self._check_open()
            for request in requests:
                if request.request_id in self._ids:
                    message = f"a request with the id {request.request_id} runs already"
                    raise InvalidFieldError(message, param="request_id")
            self._check_requests(len(requests), requests[0].owner, requests[0].queue_share, behind, own)
            self._check_sequences(requests, behind, own)
            self._ids.update(request.request_id for request in requests)
            self._messages += requests
            self._changed.notify()

    def check_room(self, owner: str, share: float, behind: Backlog, own: Backlog) -> None:
        """Raise QueueFullError when a request of this owner, with this share of the queue, would be refused now."""
        with self._changed:
            self._check_requests(1, owner, share, behind, own)

    def cancel(self, request_id: str) -> None:
        """Leave the wish to drop a request; one that is still here makes room at once, however long a step takes."""
        with self._changed:
            for message in self._messages:
                if isinstance(message, GenerationRequest) and message.request_id == request_id:
                    self._messages.remove(message)
                    self._ids.discard(request_id)
                    return
            self._messages.append(request_id)
            self._changed.notify()

    def ended(self, request_id: str) -> None:
        """Let the id of a request be used again."""
        with self._changed:
            self._ids.discard(request_id)

    def call(self, work: Callable[[], T]) -> T:
        """Leave a task, and wait until the engine thread has done it.

        Raises what `work` raises, or UnavailableError after `close`.
        """
        task = _Task(work, Future())
        with self._changed:
            self._check_open()
            self._tasks.append(task)
            self._changed.notify()
        result: T = task.result.result()
        return result

    def close(self) -> None:
        """Take nothing more but cancellations, and wake the engine thread."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def fail(self, error: EngineError) -> None:
        """Answer every later request with this error."""
        with self._changed:
            self._failure = error

    def wait(self, seconds: float) -> None:
        """Sleep, but wake when something comes."""
        with self._changed:
            self._changed.wait(seconds)

    def take(self, *, idle: bool) -> list[GenerationRequest | str]:
        """Return the requests and cancellations that have come; an idle engine waits a while for something to do."""
        with self._changed:
            if idle and not (self._messages or self._tasks or self.closed):
                self._changed.wait(_IDLE_SECONDS)
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def run_tasks(self) -> None:
        """Do the tasks that have come. One that breaks the engine stays, so that `empty` answers it."""
        while self._tasks:
            self._tasks[0].run()
            self._tasks.popleft()

    def empty(self, error: OvmsLoraError) -> list[GenerationRequest]:
        """Close; answer the tasks with an error, and return the requests that nobody will take any more."""
        with self._changed:
            self.closed = True
            left = [message for message in self._messages if isinstance(message, GenerationRequest)]
            self._messages.clear()
            for task in self._tasks:
                task.result.set_exception(error)
            self._tasks.clear()
            return left

    def _count(self) -> int:
        return sum(isinstance(message, GenerationRequest) for message in self._messages)

    def _of_owner(self, owner: str) -> list[GenerationRequest]:
        messages = (message for message in self._messages if isinstance(message, GenerationRequest))
        return [message for message in messages if message.owner == owner]

    def _check_requests(self, more: int, owner: str, share: float, behind: Backlog, own: Backlog) -> None:
        if behind.requests + self._count() + more > self._max_waiting:
            raise QueueFullError(_too_many(more, f"{self._max_waiting} requests"))
        most = max(1, int(self._max_waiting * share))
        if share < 1 and own.requests + len(self._of_owner(owner)) + more > most:
            raise QueueFullError(_too_many(more, f"{most} requests of yours"))

    def _check_sequences(self, requests: Seq[GenerationRequest], behind: Backlog, own: Backlog) -> None:
        owner, share, more = requests[0].owner, requests[0].queue_share, _sequences(requests)
        if behind.sequences + self._count_sequences() + more > MOST_SEQUENCES:
            raise QueueFullError(f"{MOST_SEQUENCES} sequences would wait with these")
        most = max(requests[0].sampling.n, int(MOST_SEQUENCES * share))
        if share < 1 and own.sequences + _sequences(self._of_owner(owner)) + more > most:
            raise QueueFullError(f"{most} sequences of yours would wait with these")

    def _count_sequences(self) -> int:
        return _sequences(message for message in self._messages if isinstance(message, GenerationRequest))

    def _check_open(self) -> None:
        if self.closed:
            raise UnavailableError("the server is shutting down")


def _sequences(requests: Iterable[GenerationRequest]) -> int:
    return sum(request.sampling.n for request in requests)


def _too_many(more: int, most: str) -> str:
    return f"{most} are waiting already" if more == 1 else f"more than {most} would wait with the {more} of this call"
