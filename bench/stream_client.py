"""A client that streams completions over plain sockets, as cheaply as it can: it counts bytes, and parses nothing.

Run as a process; takes {"port", "prompts", "tokens"} as JSON on stdin and gives the seconds that all streams took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def stream(port: int, prompt: list[int], tokens: int) -> None:
    """Stream one greedy completion of `tokens` tokens."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    received = b""
    while b"data: [DONE]" not in received:
        piece = await reader.read(1 << 16)
        if not piece:
            raise SystemExit(f"the stream broke off after {received!r}")
        received = received[-64:] + piece
    writer.close()


async def run(job: dict[str, Any]) -> float:
    """Stream all prompts at once; return the seconds."""
    begin = time.perf_counter()
    await asyncio.gather(*(stream(job["port"], prompt, job["tokens"]) for prompt in job["prompts"]))
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(asyncio.run(run(json.load(sys.stdin))))
