"""Engines: the replicas as the ingress asks them, and what their failures mean for a client.

    no replica takes the request in time, or one takes it and is gone     503
    too many wait for one that takes theirs                               429
    one is gone before it has said anything                               another is asked, once

Owns the way through Serve; what is said stands in `exchange`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import Message

from ovms_lora.core.errors import DeadlineExceededError, EngineError, OvmsLoraError, QueueFullError, UnavailableError
from ovms_lora.scale.exchange import Forwarded, is_end
from ovms_lora.scale.fleet_metrics import merged
from ovms_lora.scale.ray_errors import RAY_ERRORS
from ovms_lora.server.options import Limits

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long a request waits for a replica that takes it; when the last one has died, another needs about as long.
_TAKEN_SECONDS = 10.0
_PROBED_SECONDS = 2.0
_METRICS_SECONDS = 5.0
# The replica itself keeps the deadline of a request; this is for one that does not come to it.
_GRACE_SECONDS = 5.0


class Engines:
    """The deployment of engine replicas, asked over a handle of Serve's."""

    def __init__(self, handle: DeploymentHandle[Any], limits: Limits) -> None:
        self._handle = handle
        self._answering = handle.options(method_name="answer", stream=True)
        self._limits = limits

    async def answer(self, request: Forwarded, key: str) -> AsyncGenerator[Message]:
        """Yield the answer of the replica that the router chooses for these adapters.

        Raises QueueFullError, UnavailableError, DeadlineExceededError, or EngineError for a fault of ours; also after
        some messages.
        """
        for is_last in (False, True):
            begun = complete = False
            try:
                async with aclosing(self._ask(request, key)) as messages:
                    async for message in messages:
                        begun = True
                        complete = is_end(message)
                        yield message
                if complete:
                    return
                raise EngineError("the answer broke off")
            except RayActorError as error:
                if complete:
                    return
                log.warning("a replica has gone: %s", type(error).__name__)
                if begun or is_last:
                    raise UnavailableError("the replica that worked on the request has gone") from error

    async def metrics(self) -> bytes:
        """Return the metrics of the replicas that answer, each with its name. Raises UnavailableError if none does."""
        called = self._handle.broadcast("metrics")
        try:
            answers = await called.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        except (TimeoutError, *RAY_ERRORS) as error:
            raise UnavailableError("no replica tells its metrics now") from error
        parts = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not parts:
            raise UnavailableError("no replica tells its metrics now")
        return await asyncio.to_thread(merged, parts)

    async def _ask(self, request: Forwarded, key: str) -> AsyncGenerator[Message]:
        """Yield what one replica answers. Raises RayActorError when it is gone."""
        called = self._answering.options(multiplexed_model_id=key).remote(request)
        response, ended = cast("DeploymentResponseGenerator[list[Message]]", called), False
        try:
            patience = _PROBED_SECONDS if request.is_probe else _TAKEN_SECONDS
            await _within(patience, anext(response), UnavailableError("no replica takes the request now"))
            late = DeadlineExceededError("the request took longer than it may")
            deadline = asyncio.get_running_loop().time() + self._limits.request_seconds + _GRACE_SECONDS
            while batch := await _within(deadline - asyncio.get_running_loop().time(), anext(response, None), late):
                for message in batch:
                    ended = is_end(message)
                    yield message
            ended = True
        except RayActorError:
            ended = True
            raise
        except RAY_ERRORS as error:
            ended = True
            raise _for_client(error) from error
        finally:
            if not ended:  # the client has gone, or waits no longer
                response.cancel()  # type: ignore[no-untyped-call]


def _for_client(error: Exception) -> OvmsLoraError:
    """Return what an error of Serve's means for who asked."""
    if isinstance(error, BackPressureError):
        return QueueFullError("too many requests wait for a replica")
    if isinstance(error, DeploymentUnavailableError):
        return UnavailableError("no replica can be started")
    log.error("a replica failed: %s", error)
    return EngineError("the replica failed; the log says how")


async def _within(seconds: float, work: Awaitable[T], otherwise: OvmsLoraError) -> T:
    """Await for so long. Raises `otherwise` after that."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise otherwise from error
