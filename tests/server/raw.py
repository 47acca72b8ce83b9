"""A server on a real socket in this process, and clients that write bytes as they like."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from uvicorn.server import ServerState

from ovms_lora.server.http_server import http_config
from ovms_lora.server.options import Limits, ServerOptions
from tests.server.serving import FakeModels, Served, serving

HEAD = b"POST /v3/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"


class Listening:
    """A served application, and the port it listens on."""

    def __init__(self, served: Served, port: int, connections: set[object]) -> None:
        self.served = served
        self.port = port
        self.connections = connections

    @contextlib.asynccontextmanager
    async def client(self, *, buffer: int = 2**16) -> AsyncIterator[RawClient]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=buffer)
        try:
            yield RawClient(reader, writer)
        finally:
            writer.transport.abort()

    async def ask(self, *pieces: bytes, pause: float = 0.0) -> str:
        """Send pieces on a connection of their own; return all that comes until the server closes it."""
        async with self.client() as client:
            return await client.ask(*pieces, pause=pause)


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes, pause: float = 0.0) -> None:
        """Write pieces, as long as the server takes them."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.writer.write(piece)
                await self.writer.drain()
                await asyncio.sleep(pause)

    async def ask(self, *pieces: bytes, pause: float = 0.0) -> str:
        """Send pieces, and meanwhile read all that comes until the server closes the connection."""
        sending = asyncio.create_task(self.send(*pieces, pause=pause))
        try:
            return await self.rest()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def rest(self) -> str:
        """Return what comes until the server closes the connection; it must, within five seconds."""
        received = b""
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                while piece := await self.reader.read(2**16):
                    received += piece
        return received.decode()

    async def answer(self) -> str:
        """Return the head of one answer."""
        async with asyncio.timeout(5):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode()


def status(answer: str) -> int:
    """Return the status of an answer; 0 where there is none."""
    return int(answer.split()[1]) if answer else 0


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    """Cut bytes into pieces."""
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


def chunked(content: bytes, size: int) -> bytes:
    """Return a body in chunks."""
    chunks = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces(content, size))
    return b"".join(chunks) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def listening(
    models: FakeModels | None = None,
    *,
    options: ServerOptions | None = None,
    limits: Limits | None = None,
    source: Path | None = None,
) -> AsyncIterator[Listening]:
    options = options or ServerOptions(poll_seconds=0, limits=limits or Limits())
    async with serving(models, options=options, source=source) as served:
        config, state = http_config(served.app, options), ServerState()
        config.load()

        def connection() -> asyncio.Protocol:
            return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

        server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        try:
            yield Listening(served, server.sockets[0].getsockname()[1], state.connections)  # type: ignore[arg-type]
        finally:
            server.close()
            for task in tuple(state.tasks):
                task.cancel()
            await asyncio.gather(*state.tasks, return_exceptions=True)
            for open_one in tuple(state.connections):
                open_one.transport.abort()
            await asyncio.sleep(0)
