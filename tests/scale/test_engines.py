"""The ingress' call of a replica: cancelled for a client that leaves, and not for one that has its whole answer."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import pytest
from starlette.types import Message

from ovms_lora.scale.engines import Engines
from ovms_lora.scale.exchange import Forwarded
from ovms_lora.server.options import Limits

pytestmark = pytest.mark.anyio

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
PIECE: Message = {"type": "http.response.body", "body": b"1", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"2", "more_body": False}


class Handle:
    """Stands for a handle of Serve's, and for the response of the one call that is made over it."""

    def __init__(self) -> None:
        self.cancelled = False
        self._batches: list[Any] = [[], [START, PIECE], [END]]  # the first one says that a replica has taken it

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, _: Forwarded) -> Handle:
        return self

    async def __anext__(self) -> Any:
        if not self._batches:
            raise StopAsyncIteration
        return self._batches.pop(0)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(("last", "is_cancelled"), [(PIECE, True), (END, False)])
async def test_a_call_is_cancelled_when_the_client_leaves_before_the_end(last: Message, is_cancelled: bool) -> None:
    handle: Any = Handle()
    request = Forwarded.of(
        {"method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}, b"{}", "", 0
    )
    async with aclosing(Engines(handle, Limits()).answer(request, "")) as messages:
        async for message in messages:
            if message == last:
                break
    assert handle.cancelled == is_cancelled
