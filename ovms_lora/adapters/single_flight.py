"""SingleFlight: work in threads of its own, in which those who ask for the same thing wait for one answer.

The threads are daemons: what hangs in a network keeps nobody from ending the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from ovms_lora.core.errors import UnavailableError

T = TypeVar("T")


class SingleFlight:
    """At most `most` pieces of work at once; one more is refused."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._flying: dict[Hashable, Future[Any]] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> Future[T]:
        """Return what `work` will return, or what the work that flies under this key already will.

        Raises UnavailableError when too much flies.
        """
        with self._lock:
            flying = self._flying.get(key)
            if flying is not None:
                return flying
            if len(self._flying) >= self._most:
                raise UnavailableError("too many adapters are being fetched; try again later", retry_after=1)
            future = self._flying[key] = Future[T]()
            future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        threading.Thread(target=self._fly, args=(key, work, future), name="bucket", daemon=True).start()
        return future

    def _fly(self, key: Hashable, work: Callable[[], T], future: Future[T]) -> None:
        try:
            result = work()
        except BaseException as error:
            self._land(key)
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._land(key)
            future.set_result(result)

    def _land(self, key: Hashable) -> None:
        with self._lock:
            del self._flying[key]
