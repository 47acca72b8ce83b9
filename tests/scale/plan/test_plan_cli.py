"""`ovms-lora plan` prints a table or JSON, and says what is wrong with its flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ovms_lora import cli
from tests.scale.plan.profiles import REALISTIC


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(REALISTIC))
    return str(path)


LOAD = ["--adapters", "50", "--arrival_rate", "4", "--requests", "800"]


def test_the_table_names_the_replicas_and_the_latencies(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--profile", profile, *LOAD, "--goal", "e2e_p95=15", "--goal", "ttft_p95=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("affinity routing needs ")
    assert lines[1].startswith("random routing needs ")
    names = [line.split("  ")[0] for line in lines]
    assert {"routing", "replicas", "first token p95", "whole answer p99", "adapter in the graph", "busy"} <= set(names)
    assert lines[-1].startswith("memory of a replica: ")


def test_json_has_the_same(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--profile", profile, *LOAD, "--replicas", "2", "--max-loras", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limits"]["max_loras"] == 4
    assert found["limits"]["total_rank"] == 64
    assert [outcome["replicas"] for outcome in found["outcomes"]] == [2, 2]
    assert set(found["outcomes"][0]["ttft"]) == {"p50", "p95", "p99"}
    assert sum(found["outcomes"][0]["hits"].values()) == pytest.approx(1)


def test_an_overload_is_said_below_the_table(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    flood = ["--adapters", "50", "--arrival_rate", "400", "--requests", "800", "--replicas", "1"]
    assert cli.main(["plan", "--profile", profile, *flood]) == 0
    assert "1 replicas with affinity routing are overloaded" in capsys.readouterr().out


def test_rates_of_a_file_are_the_load(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text('{"sql": 1.5, "tools": {"rate": 0.5, "rank": 32}}')
    words = ["--rates", str(rates), "--requests", "300", "--replicas", "1", "--json"]
    assert cli.main(["plan", "--profile", profile, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["arrival_rate"] == 2
    assert found["limits"]["total_rank"] == 8 * 32


@pytest.mark.parametrize(
    ("words", "code", "said", "hint"),
    [
        ([], 2, "give either --adapters or --rates", "--adapters 200"),
        (["--adapters", "5"], 2, "--arrival_rate is missing", "five requests"),
        (LOAD, 2, "give either --goal or --replicas", "--goal ttft_p95"),
        ([*LOAD, "--goal", "fast"], 2, "is not a bound on a latency", "ttft_p95=0.5"),
        ([*LOAD, "--replicas", "0"], 2, "'0' is not a number of 1 or more", "--help"),
        ([*LOAD, "--replicas", "1", "--zipf", "nan"], 2, "is not a number of 0 or more", "--help"),
        ([*LOAD, "--replicas", "1", "--base_share", "2"], 2, "is not a share", "--help"),
        (
            [*LOAD, "--replicas", "1", "--total_rank", "8"],
            2,
            "has no room for an adapter of rank 16",
            "--total_rank 16",
        ),
        ([*LOAD, "--replicas", "1", "--max_num_seqs", "64"], 1, "up to 16 rows, not 64", "--max_rows 64"),
        ([*LOAD, "--replicas", "1", "--memory", "0.5"], 1, "one replica needs", "give more memory"),
        ([*LOAD, "--goals", "1"], 2, "unknown flag --goals", "did you mean --goal"),
    ],
)
def test_mistakes_are_answered_with_a_hint(
    profile: str, words: list[str], code: int, said: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--profile", profile, *words]) == code
    error = capsys.readouterr().err
    assert said in error
    assert hint in error.partition("hint:")[2]


def test_a_missing_profile_says_how_to_measure_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--profile", "no.json", *LOAD, "--replicas", "1"]) == 1
    assert "hint: python -m bench.replica_profile" in capsys.readouterr().err
