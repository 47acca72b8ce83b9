"""What Ray Serve costs and gives: the time to the first token through the ingress, and the tokens of two replicas.

    python -m bench.ray_serve

Each replica has one thread, as the servers that are asked directly. All are up at the same time and are asked in turn;
who is not asked stands still, since an idle Ray takes a part of a processor. Two replicas get twice the requests of
one, so that each works on as many rows. Two servers without Ray are asked in the same way: what they do not reach
together is the machine's doing. Answers are asked for as a whole and as streams, whose events cost the processes
between client and engine something for each token.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench.models import smollm2
from bench.results import write_results
from bench.served import running
from bench.workload import prompts

_VOCABULARY = 1000
_FIRST_TOKENS, _WARM = 60, 10
_AT_ONCE, _TOKENS, _ROUNDS = 8, 32, 5  # requests of one replica
_SETTLING_SECONDS = 1.0  # in which processes do what they have missed
_ONE_THREAD = ("--plugin_config", '{"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": false}')
# Full with its requests, so that two of them share twice as many evenly.
_RAY = ("--num_cpus", "1", "--target_ongoing_requests", str(_AT_ONCE))


@dataclass(frozen=True, slots=True)
class _Up:
    """A server or a Ray that runs: its port, and its first process."""

    port: int
    pid: int

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        for pid in _tree(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def main() -> int:
    """Measure; print the numbers and keep them."""
    with ExitStack() as stack:
        direct, other = (stack.enter_context(_up("serve", *_ONE_THREAD)) for _ in range(2))
        one = stack.enter_context(_up("ray", *_RAY, "--num_replicas", "1"))
        two = stack.enter_context(_up("ray", *_RAY, "--num_replicas", "2"))
        servers = {"server": [direct], "two_servers": [direct, other], "replica": [one], "two_replicas": [two, two]}
        two.send(signal.SIGSTOP)
        other.send(signal.SIGSTOP)
        first_tokens = _first_tokens(direct.port, one.port)
        for each in (direct, one):
            each.send(signal.SIGSTOP)
        found = {
            "first_token_ms": first_tokens,
            "tokens_per_second": _rates(servers, stream=False),
            "tokens_per_second_streamed": _rates(servers, stream=True),
        }
    print(write_results("ray_serve", found))
    return 0


def _first_tokens(direct: int, one: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"direct": [], "ingress": []}
    for prompt in prompts(_FIRST_TOKENS + _WARM, 16, vocabulary=_VOCABULARY):
        for name, port in (("direct", direct), ("ingress", one)):
            seconds[name].append(_ask(port, prompt, 2, stream=True))
    medians = {name: 1000 * statistics.median(values[_WARM:]) for name, values in seconds.items()}
    found = {**medians, "added": medians["ingress"] - medians["direct"]}
    print("first token, ms:", json.dumps(found), flush=True)
    return found


def _rates(servers: dict[str, list[_Up]], *, stream: bool) -> dict[str, float]:
    """Return medians of tokens per second, and of what two reach of one in the same round."""
    rounds = [{name: _rate(asked, stream=stream) for name, asked in servers.items()} for _ in range(_ROUNDS + 1)][1:]
    found = {name: statistics.median(rates[name] for rates in rounds) for name in servers}
    found["ratio"] = statistics.median(rates["two_replicas"] / rates["replica"] for rates in rounds)
    found["ratio_of_servers"] = statistics.median(rates["two_servers"] / rates["server"] for rates in rounds)
    print(f"tokens per second, {'streamed' if stream else 'whole answers'}:", json.dumps(found), flush=True)
    return found


def _rate(servers: list[_Up], *, stream: bool) -> float:
    """Return the tokens per second of requests to all of the servers, as many to each; others stand still."""
    asked = prompts(_AT_ONCE * len(servers), 16, vocabulary=_VOCABULARY)
    ports = [server.port for server in servers] * _AT_ONCE
    for server in servers:
        server.send(signal.SIGCONT)
    time.sleep(_SETTLING_SECONDS)
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(lambda port, prompt: _ask(port, prompt, _TOKENS, stream=stream), ports, asked))
    seconds = time.perf_counter() - begun
    for server in servers:
        server.send(signal.SIGSTOP)
    return len(asked) * _TOKENS / seconds


def _ask(port: int, prompt: list[int], tokens: int, *, stream: bool) -> float:
    """Read a whole answer; return the seconds until its first line."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.readline()
    seconds = time.perf_counter() - begun
    rest = answer.read()
    if answer.status != 200 or (stream and not rest.endswith(b"data: [DONE]\n\n")):
        raise SystemExit("error: a request failed, or its stream broke off")
    connection.close()
    return seconds


@contextmanager
def _up(verb: str, *flags: str) -> Iterator[_Up]:
    """Run a command of `ovms-lora` in processes of its own."""
    with running(verb, "--model_path", str(smollm2()), "--model_name", "m", *flags) as server:
        up = _Up(urlsplit(server.url).port or 0, server.pid)
        try:
            yield up
        finally:
            up.send(signal.SIGCONT)


def _tree(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            children += map(int, task.read_text().split())
    return [pid, *(each for child in children for each in _tree(child))]


if __name__ == "__main__":
    sys.exit(main())
