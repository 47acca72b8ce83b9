"""A served model, over HTTP, stays right and keeps nothing, whatever clients do; and the report says so if not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.soak import Report, slope, soak
from bench.soak_server import Size


@pytest.mark.parametrize("minutes", [0.25, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_soak_finds_nothing(tmp_path: Path, minutes: float) -> None:
    report = soak(tmp_path, minutes)
    assert report.failures == [], "\n".join(report.lines())
    assert report.requests > 100


def size(minute: float, megabytes: float) -> Size:
    return Size(minute * 60, megabytes, descriptors=10, threads=10, processes=1)


GOOD = Report(30, 1000, {"good 200": 1000}, 0.1, 0.2, 0.0, size(0, 100), size(30, 100), 0.0, ())


def test_the_slope_is_that_of_the_line() -> None:
    assert slope([size(minute, 100 + minute) for minute in range(10)]) == pytest.approx(60)


def test_a_good_report_fails_for_nothing() -> None:
    assert GOOD.failures == []


@pytest.mark.parametrize(
    ("bad", "failure"),
    [
        (replace(GOOD, slope=500.0), "memory grows by 500 MB/h"),
        (replace(GOOD, held=1.0), "requests or blocks are still held at rest (1.0)"),
        (replace(GOOD, after=replace(GOOD.after, descriptors=50)), "40 more descriptors than before"),
        (replace(GOOD, after=replace(GOOD.after, threads=50)), "40 more threads than before"),
        (replace(GOOD, faults=("a wrong answer",)), "a wrong answer"),
    ],
)
def test_what_is_wrong_fails(bad: Report, failure: str) -> None:
    assert bad.failures == [failure]
    assert f"FAILED: {failure}" in bad.lines()
