"""What the measurements compute from what they have measured."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from bench.arrivals import poisson, zipf
from bench.engines.job import Job, in_groups
from bench.part import Row
from bench.report import TARGETS, Results, report
from bench.results import Result, read_parts, write_part, write_results
from bench.rounds import in_turn, quantile, spreads
from bench.step_time import steps
from bench.workload import Run


def test_arrivals_come_at_their_rate_and_in_order() -> None:
    times = poisson(50.0, 100.0, seed=3)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.05)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # e ** -1


def test_zipf_gives_each_number_its_share() -> None:
    found = zipf(20_000, 4, seed=1)
    shares = [found.count(number) / len(found) for number in range(4)]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.02)


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1.0, 50.0, 95.0, 100.0]
    assert quantile([], 0.5) == 0.0


def test_every_case_has_its_turn_in_every_round_and_begins_one() -> None:
    asked: list[tuple[str, int]] = []

    def case(name: str, number: int) -> float:
        asked.append((name, number))
        return float(number)

    found = in_turn({name: lambda number, name=name: case(name, number) for name in "abc"}, 2)  # type: ignore[misc]
    assert asked == [(name, 0) for name in "abc"] + [(name, 1) for name in "abc"] + [(name, 2) for name in "bca"]
    assert found == {name: [1.0, 2.0] for name in "abc"}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (35.0, 2), (40.0, 3), (600.0, 4)])
def test_there_are_no_more_rounds_than_fit_into_the_seconds_but_one(seconds: float, rounds: int) -> None:
    now = [0.0]

    def ten_seconds(number: int) -> int:
        now[0] += 10.0
        return number

    found = in_turn({"a": ten_seconds}, 4, seconds=seconds, clock=lambda: now[0])
    assert found["a"] == [1, 2, 3, 4][:rounds]


def test_ratios_are_taken_within_a_round() -> None:
    spread = spreads({"first": [100.0, 10.0, 50.0], "other": [50.0, 5.0, 50.0]})["other"]
    assert (spread.median, spread.low, spread.high, spread.ratio) == (50.0, 5.0, 50.0, 0.5)
    assert spread.columns("rate") == {"rate": 50.0, "rate_low": 5.0, "rate_high": 50.0, "of_first": 0.5, "rounds": 3}


def test_a_run_tells_latencies_of_each_request() -> None:
    run = Run([[1, 2, 3], [4]], [[0.5, 0.75, 1.5], [0.25]], 2.0)
    assert (run.rate, run.first_token_times, run.intervals) == (2.0, [0.5, 0.25], [0.25, 0.75])


def test_a_step_lasts_to_the_begin_of_the_next_one() -> None:
    assert steps([(0.0, 3.0), (4.0, 6.0), (6.5, 9.0)]) == [(4.0, 3.0), (2.5, 2.0)]


def test_rows_of_one_adapter_run_together_and_answers_keep_their_order() -> None:
    job = Job([[1], [2], [3]], ["a", None, "a"], 1)
    asked: list[tuple[str | None, list[list[int]]]] = []

    def run(adapter: str | None, prompts: object) -> list[list[int]]:
        assert isinstance(prompts, list)
        asked.append((adapter, prompts))
        return [[prompt[0] * 10] for prompt in prompts]

    assert in_groups(job, run) == [[10], [20], [30]]
    assert asked == [("a", [[1], [3]]), (None, [[2]])]


def test_results_come_back_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.results.RESULTS", tmp_path / "results")
    rows: list[Row] = [{"case": "plain", "seconds": 1.5}]
    write_part("startup", "smollm2", rows, long=False)
    write_results("plan_check-tiny", {"rows": {"tokens/s": 1.0}})  # of what is no part
    (found,) = read_parts(tmp_path / "results")
    assert (found.part, found.model, found.rows) == ("startup", "smollm2", rows)
    assert found.machine["cores"] >= 1 and found.machine["processor"] and found.machine["packages"]["openvino"]


def result(part: str, *rows: dict[str, str | float], model: str = "smollm2") -> Result:
    return Result(part, model, rows, {})


def test_the_report_says_what_is_met_and_what_was_not_measured() -> None:
    results = [
        result(
            "startup", {"case": "second start", "seconds": 2.5}, {"case": "import ovms_lora.server", "seconds": 1.5}
        ),
        result(
            "side_by_side",
            {"case": "plain", "batch": 8, "engine": "ovms-lora", "of_first": 1.0},
            {"case": "plain", "batch": 8, "engine": "genai", "of_first": 0.5, "rounds": 3},
        ),
    ]
    lines = report(results).splitlines()
    assert "| plain, batch 8, against genai | ≥ 1.3 times | 2 times | 3 | yes |" in lines
    assert "| second start to ready, smollm2 | ≤ 3 s | 2.5 s |  | yes |" in lines
    assert "| import ovms_lora.server | ≤ 1 s | 1.5 s |  | no |" in lines
    assert "| plain, batch 1, against genai | ≥ 1.05 times | not measured | | |" in lines
    assert len(lines) == 2 + len(TARGETS)


def test_every_target_can_be_found() -> None:
    assert [target.find(Results([])) for target in TARGETS] == [None] * len(TARGETS)
