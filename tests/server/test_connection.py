"""What clients do to a connection that no HTTP library would: lie, dribble, stall, flood."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from ovms_lora.server.options import Limits
from tests.fakes import FakeRunner
from tests.server.raw import HEAD, chunked, listening, pieces, status
from tests.server.serving import FakeModels

pytestmark = pytest.mark.anyio

BODY = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 1}).encode()
CLOSE = b"Connection: close\r\n"
GET = b"GET /v2 HTTP/1.1\r\nHost: t\r\n"


def sized(body: bytes, declared: int | None = None) -> bytes:
    length = len(body) if declared is None else declared
    return HEAD + CLOSE + b"Content-Length: %d\r\n\r\n" % length + body


@pytest.mark.parametrize(("size", "expected"), [(1999, 200), (2000, 200), (2001, 413)])
async def test_bodies_end_at_the_limit(size: int, expected: int) -> None:
    body = BODY.ljust(size)
    async with listening(limits=Limits(body_bytes=2000)) as server:
        assert status(await server.ask(sized(body))) == expected
        head = HEAD + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n"
        for chunk in (1, 100, size):
            assert status(await server.ask(head + chunked(body, chunk))) == expected


async def test_a_body_of_more_than_is_taken_is_refused_by_its_head() -> None:
    async with listening() as server:
        begun = time.monotonic()
        for declared in (2 * 1024 * 1024 + 1, 10**18, 10**20 - 1):
            answer = await server.ask(sized(b"", declared))
            assert (status(answer), "connection: close" in answer.lower()) == (413, True)
        assert time.monotonic() - begun < 1


async def test_a_body_in_chunks_without_end_is_cut_off() -> None:
    async with listening(limits=Limits(body_bytes=100_000)) as server, server.client() as client:
        sending = asyncio.create_task(
            client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1000\r\n" + b" " * 4096 + b"\r\n"] * 10_000)
        )
        assert status(await client.answer()) == 413
        await asyncio.wait_for(sending, 5)


@pytest.mark.parametrize("declared", [True, False])
async def test_who_sends_it_all_before_reading_gets_the_answer(declared: bool) -> None:
    """A connection that is closed with bytes unread is reset, and then the client's kernel drops the answer."""
    size = 8_000_000  # more than sockets hold
    async with listening() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            body = b"x" * size if declared else chunked(b"x" * size, 100_000)
            length = b"Content-Length: %d\r\n\r\n" % size if declared else b"Transfer-Encoding: chunked\r\n\r\n"
            await asyncio.to_thread(client.sendall, HEAD + length + body)
            answer = await asyncio.to_thread(_read_all, client)
    assert status(answer) == 413
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]


def _read_all(client: socket.socket) -> str:
    client.settimeout(5)
    received = b""
    while piece := client.recv(2**16):
        received += piece
    return received.decode()


async def test_less_than_declared_is_waited_for_no_longer_than_the_deadline() -> None:
    async with listening(limits=Limits(receive_seconds=0.2)) as server:
        begun = time.monotonic()
        assert status(await server.ask(sized(BODY, len(BODY) + 1))) == 408
        assert 0.15 < time.monotonic() - begun < 2


async def test_more_than_declared_is_no_second_request() -> None:
    async with listening() as server:
        smuggled = b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n"
        answer = await server.ask(sized(BODY) + smuggled)
        assert answer.count("HTTP/1.1 ") == 1
        assert status(answer) == 200


@pytest.mark.parametrize(
    "lengths",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5, 6\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
    ],
)
async def test_bodies_of_doubtful_length_are_refused(lengths: bytes) -> None:
    async with listening() as server:
        answer = await server.ask(HEAD + lengths + b"\r\n" + b"5\r\nhello\r\n0\r\n\r\n")
        assert 400 <= status(answer) < 502
        assert "connection: close" in answer.lower()
        assert answer.count("HTTP/1.1 ") == 1


@pytest.mark.parametrize("slow", [GET, GET + b"X-Slow: " + b"x" * 500])
async def test_headers_that_come_too_slowly_answer_408(slow: bytes) -> None:
    async with listening(limits=Limits(receive_seconds=0.3)) as server:
        begun = time.monotonic()
        answer = await server.ask(*pieces(slow, 1), pause=0.02)
        assert (status(answer), "connection: close" in answer.lower()) == (408, True)
        assert 0.25 < time.monotonic() - begun < 2
        assert not server.connections


async def test_headers_in_pieces_within_the_deadline_are_taken() -> None:
    async with listening(limits=Limits(receive_seconds=2)) as server:
        assert status(await server.ask(*pieces(GET + CLOSE + b"\r\n", 5), pause=0.001)) == 200


async def test_slow_headers_after_an_answer_are_cut_off_too() -> None:
    async with listening(limits=Limits(receive_seconds=0.3)) as server, server.client() as client:
        await client.send(GET + b"\r\n")
        assert status(await client.answer()) == 200
        assert "HTTP/1.1 408" in await client.ask(*pieces(GET, 1), pause=0.03)


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with listening(limits=Limits(receive_seconds=0.2)) as server:
        assert await server.ask() == ""


async def test_the_clock_of_the_head_stops_while_a_request_is_answered() -> None:
    models = FakeModels(runner=lambda: FakeRunner(num_blocks=1024, before_step=lambda _: time.sleep(0.02)))
    async with listening(models, limits=Limits(receive_seconds=0.2)) as server:
        body = json.dumps({"model": "m", "prompt": "hi", "max_tokens": 30, "ignore_eos": True}).encode()
        assert status(await server.ask(sized(body))) == 200


async def test_a_body_that_dribbles_is_cut_off_whatever_it_sends() -> None:
    async with listening(limits=Limits(receive_seconds=0.3)) as server:
        begun = time.monotonic()
        answer = await server.ask(sized(b"", 500), *[b" "] * 200, pause=0.02)
        assert status(answer) == 408
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("more", "expected"), [(-1, 200), (0, 200), (1, 431)])
async def test_headers_end_at_the_limit(more: int, expected: int) -> None:
    async with listening(limits=Limits(header_bytes=1000)) as server:
        counted = len("host") + len("t") + len("connection") + len("close") + len("x-long")
        head = GET + CLOSE + b"X-Long: " + b"x" * (1000 - counted + more) + b"\r\n\r\n"
        assert status(await server.ask(head)) == expected
        assert status(await server.ask(*pieces(head, 100))) == expected


async def test_headers_without_end_are_cut_off() -> None:
    async with listening() as server, server.client() as client:
        sending = asyncio.create_task(client.send(GET, *[b"X-More: " + b"x" * 1000 + b"\r\n"] * 10_000))
        assert status(await client.answer()) == 431
        await asyncio.wait_for(sending, 5)


@pytest.mark.parametrize(("more", "expected"), [(-1, 400), (0, 400), (1, 414)])
async def test_addresses_are_bounded_as_headers_are(more: int, expected: int) -> None:
    async with listening(limits=Limits(header_bytes=1000)) as server:
        address = b"/".ljust(1000 + more, b"x")
        assert status(await server.ask(b"GET " + address + b" HTTP/1.1\r\nHost: t\r\n" + CLOSE + b"\r\n")) == expected


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,  # TLS
        b"GET  /v2\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n\r\n",  # no Host
        b"GET /v2 HTTP/1.1\r\nHost: t\r\nBad Header: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: t\r\nX: a\0b\r\n\r\n",
        b"\r\n" * 10 + b"nonsense\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: t\r\n\r\n",
    ],
)
async def test_what_is_not_http_answers_400_and_ends(rubbish: bytes) -> None:
    async with listening() as server:
        answer = await server.ask(rubbish)
        assert status(answer) == 400
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]
        assert status(await server.ask(GET + CLOSE + b"\r\n")) == 200


async def test_web_sockets_are_not_spoken() -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Version: 13\r\n"
    async with listening() as server:
        answer = await server.ask(GET + upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert status(answer) == 200


async def test_connections_end_at_the_limit() -> None:
    async with listening(limits=Limits(connections=2)) as server:
        async with server.client() as first, server.client() as second:
            for client in (first, second):
                await client.send(GET + b"\r\n")
                assert status(await client.answer()) == 200
            answer = await server.ask(GET + b"\r\n")
            assert (status(answer), "retry-after: 1" in answer.lower()) == (503, True)
            await first.send(GET + b"\r\n")
        async with asyncio.timeout(5):
            while server.connections:
                await asyncio.sleep(0.01)
        assert status(await server.ask(GET + CLOSE + b"\r\n")) == 200


async def test_who_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    async with listening(limits=Limits(send_seconds=0.3)) as server:
        body = json.dumps({"model": "m", "prompt": "x" * 700_000, "return_token_strs": True}).encode()
        head = HEAD.replace(b"/v3/completions", b"/v1/tokenize")
        request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, ("127.0.0.1", server.port))
            await loop.sock_sendall(slow, request)
            async with asyncio.timeout(10):
                while not server.connections:
                    await asyncio.sleep(0.01)
                while server.connections:
                    assert status(await server.ask(sized(BODY))) == 200
                    await asyncio.sleep(0.05)
        finally:
            slow.close()
