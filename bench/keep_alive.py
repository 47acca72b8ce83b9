"""Connections to one server that are used again: HTTP/1.1 as cheaply as it goes, for clients that ask often.

A library's client would be busier than the server that it measures. Knows of answers their status, their headers and
where they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_IDLE_SECONDS = 2.0  # none is used again just when the server closes it for being idle


@dataclass(frozen=True, slots=True)
class Answer:
    """The status of an answer (0: there was none), its headers in lower case, and its body."""

    status: int = 0
    headers: bytes = b""
    body: bytes = b""


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: float = 0.0

    @property
    def fresh(self) -> bool:
        return not self.reader.at_eof() and time.monotonic() - self.used < _IDLE_SECONDS


class KeepAlive:
    """As many connections as there are requests at once. Use it in `async with`."""

    def __init__(self, host: str, port: int, *, seconds: float = 600.0) -> None:
        self._host = host
        self._port = port
        self._seconds = seconds
        self._idle: list[_Connection] = []
        self._made: list[_Connection] = []

    async def __aenter__(self) -> KeepAlive:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._made:
            connection.writer.close()
        await asyncio.gather(*(each.writer.wait_closed() for each in self._made), return_exceptions=True)

    async def post(self, path: str, body: Mapping[str, Any], key: str | None = None) -> Answer:
        """Ask once; without an answer in time, or with a broken one, the status is 0."""
        data = json.dumps(body).encode()
        head = [f"POST {path} HTTP/1.1", f"Host: {self._host}", "Content-Type: application/json"]
        head += [f"Authorization: Bearer {key}"] if key else []
        request = "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data
        try:
            async with asyncio.timeout(self._seconds), self._connection() as connection:
                connection.writer.write(request)
                return await _read(connection.reader)
        except (OSError, EOFError, TimeoutError):
            return Answer()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[_Connection]:
        """Lend a connection; it comes back only when all went well."""
        while self._idle and not self._idle[-1].fresh:
            self._idle.pop().writer.transport.abort()
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            yield connection
        except BaseException:
            connection.writer.transport.abort()
            raise
        connection.used = time.monotonic()
        self._idle.append(connection)

    async def _connect(self) -> _Connection:
        connection = _Connection(*await asyncio.open_connection(self._host, self._port))
        self._made.append(connection)
        return connection


async def _read(reader: asyncio.StreamReader) -> Answer:
    """Read one answer whose length is declared."""
    head = await reader.readuntil(b"\r\n\r\n")
    status, _, headers = head.partition(b"\r\n")
    headers = headers.lower()
    length = headers.partition(b"content-length:")[2].partition(b"\r\n")[0]
    return Answer(int(status.split()[1]), headers, await reader.readexactly(int(length)))
