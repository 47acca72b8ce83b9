"""Does the server stay right, and of its size, under clients of all kinds while adapters and config.json change?

python -m bench.soak [--minutes 2]

Prints a report, writes it to bench/results/, and exits with 1 when an answer was wrong or something leaks. A part of
the time warms up; sizes are compared between two moments at rest, and memory by a line through all moments between;
memory is judged in soaks of ten minutes and more.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.results import write_results
from bench.soak_clients import Tally, Traffic
from bench.soak_server import Size, SoakFolder, SoakServer, at_rest

_CLIENTS = 8
_WARM_UP = 0.4  # of the time
_SAMPLE_SECONDS = 1.0
_SLACK = 8  # descriptors, threads or processes: pools grow when they are needed
_NOISE_MEGABYTES = 12.0  # by which memory moves up and down, whatever the time
_SLOPE_LIMIT = 40.0  # MB/h beyond that noise
_JUDGED_MINUTES = 10.0  # before, memory still grows with steps of new lengths


@dataclass(frozen=True, slots=True)
class Report:
    """What a soak has found. Memory in MB and MB/h, latencies of whole good answers in seconds."""

    minutes: float
    requests: int
    answers: dict[str, int]
    p50: float
    p99: float
    slope: float
    before: Size
    after: Size
    held: float
    faults: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """What is wrong; nothing, if all is well."""
        found = [*self.faults]
        if self.held:
            found.append(f"requests or blocks are still held at rest ({self.held})")
        for name in ("descriptors", "threads", "processes"):
            grown = getattr(self.after, name) - getattr(self.before, name)
            if grown > _SLACK:
                found.append(f"{grown} more {name} than before")
        hours = (self.after.at - self.before.at) / 3600
        if self.minutes >= _JUDGED_MINUTES and self.slope * hours > _NOISE_MEGABYTES + _SLOPE_LIMIT * hours:
            found.append(f"memory grows by {self.slope:.0f} MB/h")
        return found

    def lines(self) -> list[str]:
        """Return the report for people."""
        before, after = self.before, self.after
        answers = ", ".join(f"{name}: {count}" for name, count in sorted(self.answers.items()))
        return [
            f"{self.minutes:g} minutes, {self.requests} requests; {answers}",
            f"good answers: p50 {self.p50 * 1e3:.0f} ms, p99 {self.p99 * 1e3:.0f} ms",
            f"memory: {before.megabytes:.1f} -> {after.megabytes:.1f} MB, slope {self.slope:+.1f} MB/h",
            f"descriptors: {before.descriptors} -> {after.descriptors}, threads: {before.threads} -> {after.threads}, "
            f"processes: {before.processes} -> {after.processes}, held at rest: {self.held:g}",
            *(f"FAILED: {failure}" for failure in self.failures),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {**asdict(self), "failures": self.failures}


class Sampler:
    """Measures a server once a second, in a thread of its own; use it in `with`."""

    def __init__(self, server: SoakServer) -> None:
        self.sizes: list[Size] = []
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self.sizes.append(self._server.size())


def slope(sizes: Sequence[Size]) -> float:
    """Return the growth of memory in MB/h: the line of least squares."""
    hours = [size.at / 3600 for size in sizes]
    return statistics.linear_regression(hours, [size.megabytes for size in sizes]).slope


def soak(folder: Path, minutes: float) -> Report:
    """Serve a tiny model from a new folder and let clients at it."""
    made = SoakFolder(folder)
    with SoakServer(made) as server:
        url = server.url()
        traffic = Traffic(url, made)
        asyncio.run(traffic.learn())
        asyncio.run(traffic.run(minutes * 60 * _WARM_UP, _CLIENTS))
        warm_up = traffic.tally
        at_rest(url)
        before = server.size()
        with Sampler(server) as sampler:
            asyncio.run(traffic.run(minutes * 60 * (1 - _WARM_UP), _CLIENTS))
        held = at_rest(url)
        after = server.size()
        asyncio.run(traffic.check_canaries())
        code = server.stop()
        faults = [*warm_up.faults, *traffic.tally.faults, *_of_the_end(code, server.log)]
    return _report(traffic.tally, minutes, slope(sampler.sizes), before, after, held, faults)


def _report(
    tally: Tally, minutes: float, grown: float, before: Size, after: Size, held: float, faults: Sequence[str]
) -> Report:
    cuts = statistics.quantiles(tally.seconds, n=100)
    return Report(
        minutes=minutes,
        requests=sum(tally.answers.values()),
        answers=dict(tally.answers),
        p50=cuts[49],
        p99=cuts[98],
        slope=grown,
        before=before,
        after=after,
        held=held,
        faults=tuple(faults),
    )


def _of_the_end(code: int, log: str) -> list[str]:
    faults = [] if code == 0 else [f"the server ended with exit code {code}"]
    if "Traceback" in log:
        faults.append("the log has a traceback:\n" + log[log.index("Traceback") :][:3000])
    return faults


def main() -> int:
    """Soak, report, and judge."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), options.minutes)
    print("\n".join(report.lines()))
    print(write_results(f"soak-{options.minutes:g}m", report.as_json()))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
