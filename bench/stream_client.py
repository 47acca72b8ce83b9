"""A client that streams completions over plain sockets, as cheaply as it can: it looks for events, and parses nothing.

Run as a process; takes {"host", "port", "path", "asks": [{"at", "body"}]} as JSON on stdin. Each ask is sent `at`
seconds after the start, whatever has become of the others. Gives for each its status and the times of its events.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

_EVENT, _END = b"data: ", b"data: [DONE]"


async def stream(job: dict[str, Any], ask: dict[str, Any], begin: float) -> dict[str, Any]:
    """Send one request on time; return when it was sent, its status, and when each event came."""
    await asyncio.sleep(begin + ask["at"] - time.perf_counter())
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection(job["host"], job["port"])
    data = json.dumps({**ask["body"], "stream": True}).encode()
    lines = [f"POST {job['path']} HTTP/1.1", f"Host: {job['host']}", "Content-Type: application/json"]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    status = int((await reader.readline()).split()[1])
    times = await _events(reader) if status == 200 else []
    writer.close()
    return {"sent": sent - begin, "status": status, "times": [moment - begin for moment in times]}


async def _events(reader: asyncio.StreamReader) -> list[float]:
    """Return when each event came, without the one that ends the stream; those of one piece came at once."""
    times: list[float] = []
    rest = b""
    while _END not in rest:
        piece = await reader.read(1 << 16)
        if not piece:
            raise SystemExit(f"the stream broke off after {rest[-200:]!r}")
        whole, _, rest = (rest + piece).rpartition(b"\n\n")
        times += [time.perf_counter()] * (whole.count(_EVENT) - whole.count(_END))
        rest = whole[-len(_END) :] + rest if _END in whole else rest
    return times


async def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Stream all asks; return what became of each."""
    begin = time.perf_counter()
    return await asyncio.gather(*(stream(job, ask, begin) for ask in job["asks"]))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
